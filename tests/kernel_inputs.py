"""Random inputs of the C kernels, and the mark of a test that runs in every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

ODD = (float("nan"), float("inf"), float("-inf"))
in_all_instruction_sets = pytest.mark.usefixtures("instruction_set")


def random(*shape: int, transposed: bool = False) -> Tensor:
    """In bf16; a matrix may have its columns' elements next to each other."""
    return (
        torch.randn(*shape[:-2], shape[-1], shape[-2]).bfloat16().mT if transposed else torch.randn(*shape).bfloat16()
    )
