"""The C kernels in tests of what stands on them."""

from __future__ import annotations

import pytest
import torch

from buleyean_rl.kernels import abi


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor's kernels are used, also those that are for matrix registers; `tiles` goes through others too."""
    if not abi.available(torch.zeros(0, dtype=torch.bfloat16)):
        pytest.skip("no C compiler, or a torch without OpenMP")
    monkeypatch.setattr(abi, "_tiles", lambda: 2)
