"""Element-wise passes in one sweep: RMSNorm and SwiGLU; and the loss's on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import call

LOGITS = (torch.float32, torch.bfloat16, torch.float16)


class LossPasses(NamedTuple):
    """Passes over a tile of logits, (vocabulary, nodes), in one sweep each; see `triton.py`."""

    row_max: Callable[[Tensor], Tensor]
    softmax_sums: Callable[..., tuple[Tensor, Tensor, Tensor]]
    softmax_gradient: Callable[..., None]


def loss_passes(tile: Tensor) -> LossPasses | None:
    """Those for a tile of logits on a GPU, where Triton came with torch; None for torch's own operations."""
    if not tile.is_cuda or tile.dtype not in LOGITS:
        return None
    try:
        from buleyean_rl.kernels import triton
    except ImportError:
        return None
    return LossPasses(triton.row_max, triton.softmax_sums, triton.softmax_gradient)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / rms(x).

    Args:
        x: contiguous. Shape: (..., width).
        weight: Shape: (width,).
        epsilon: added to the mean square.
    """
    width, y = x.shape[-1], torch.empty_like(x)
    call("rms_norm", x, weight, epsilon, None, None, x.numel() // width, width, y, None)
    return y


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The gradient in `x` from that in the result of `rms_norm`. Shapes as there, contiguous."""
    width, grad_x = x.shape[-1], torch.empty_like(x)
    call("rms_norm", x, weight, epsilon, gradient, None, x.numel() // width, width, None, grad_x)
    return grad_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. Shape: (..., 2 * width), gate before up, contiguous; to (..., width), a multiple of `BLOCK`."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    call("swiglu", gate_up, 2 * width, None, y.numel() // width, width, y, None)
    return y


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in `gate_up` from that in the result of `swiglu`. Shapes as there, contiguous."""
    width, grad = gradient.shape[-1], torch.empty_like(gate_up)
    call("swiglu", gate_up, 2 * width, gradient, gradient.numel() // width, width, None, grad)
    return grad
