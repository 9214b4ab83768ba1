"""What others' private interfaces are made to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from buleyean_rl.models.private_interfaces import current_gpu_kept, use_current_gpu


def test_each_process_stays_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = SimpleNamespace(n_gpu=8, device=torch.device("cuda", 0))
    with current_gpu_kept():
        torch.cuda.set_device(0)  # as transformers does
    use_current_gpu(arguments)
    assert chosen == [3, 0, 3]
    assert (arguments._n_gpu, vars(arguments)["_setup_devices"]) == (1, torch.device("cuda", 3))
