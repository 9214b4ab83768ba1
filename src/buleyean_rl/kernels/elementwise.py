"""Element-wise passes in one sweep: RMSNorm and SwiGLU; and the loss's on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import RmsNormArgs, SwigluArgs, address, call

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
    places = address(x), address(weight), None, None, address(y), None
    call("rms_norm", byref(RmsNormArgs(*places, x.numel() // width, width, epsilon)))
    return y


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The gradient in `x` from that in the result of `rms_norm`. Shapes as there, contiguous."""
    width, grad_x = x.shape[-1], torch.empty_like(x)
    places = address(x), address(weight), address(gradient), None, None, address(grad_x)
    call("rms_norm", byref(RmsNormArgs(*places, x.numel() // width, width, epsilon)))
    return grad_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. Shape: (..., 2 * width), gate before up, contiguous; to (..., width), a multiple of `BLOCK`."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    places = address(gate_up), None, address(y), None
    call("swiglu", byref(SwigluArgs(*places, 2 * width, y.numel() // width, width)))
    return y


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in `gate_up` from that in the result of `swiglu`. Shapes as there, contiguous."""
    width, grad = gradient.shape[-1], torch.empty_like(gate_up)
    places = address(gate_up), address(gradient), None, address(grad)
    call("swiglu", byref(SwigluArgs(*places, 2 * width, gradient.numel() // width, width)))
    return grad
