"""What others' private interfaces are made to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from buleyean_rl.models.private_interfaces import on_one_gpu


def test_each_process_stays_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 3)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: current.append(torch.device("cuda", gpu)))
    arguments = SimpleNamespace(use_cpu=False, n_gpu=8, device=torch.device("cuda", 0))
    with on_one_gpu(arguments):
        torch.cuda.set_device(0)  # as transformers does
    assert current[-1] == vars(arguments)["_setup_devices"] == torch.device("cuda", 3)
    assert arguments._n_gpu == 1
