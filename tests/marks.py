"""What a machine must have for some of the tests."""

import pytest
import torch

from buleyean_rl.kernels import abi

needs_c = pytest.mark.skipif(
    not abi.available(torch.zeros(0, dtype=torch.bfloat16)), reason="no C compiler, or a torch without OpenMP"
)
