"""Element-wise passes in one sweep: softmax sums, RMSNorm, SwiGLU, rotary embedding, dropout."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from buleyean_rl.kernels import build
from buleyean_rl.kernels.abi import _call, available


def loss_passes(tile: Tensor) -> ModuleType | None:
    """The module whose `column_most`, `softmax_sums` and `softmax_gradient` take a tile of logits; None for torch."""
    if tile.is_cuda and tile.dtype in (*build.SOURCES, torch.float16):
        return _triton()
    return sys.modules[__name__] if available(tile) else None


def column_most(x: Tensor) -> Tensor:
    """The largest value of each column. Shape: (rows, columns) to (columns,), in fp32."""
    threads = torch.get_num_threads()
    most = torch.empty(threads, x.shape[1])
    _call("column_most", x, *x.shape, most, threads)
    return most.amax(0)


def softmax_sums(
    z: Tensor, z_ref: Tensor | None, scale: float, most: Tensor, base_most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the rows, for each column: sum e^z, sum e^z_ref and sum e^z_ref (z_ref - z), exponents less the most.

    Args:
        z: Shape: (vocabulary, nodes), a node's logits less `scale` in a column; columns next to each other.
        z_ref: the reference's, with the stride of `z`, or None for zeros.
        scale: factor on the logits.
        most: subtracted from z before its exponential. Shape: (nodes,).
        base_most: the same for z_ref. Shape: (nodes,).

    Returns:
        Three tensors of shape (nodes,).
    """
    rows, nodes = z.shape
    threads = torch.get_num_threads()
    sums = torch.empty(threads, 3, nodes)
    _call("softmax_sums", z, z_ref, rows, nodes, z.stride(0), scale, most, base_most, sums, threads)
    total, base_total, difference = sums.sum(0)
    return total, base_total, difference


def softmax_gradient(
    z: Tensor, z_ref: Tensor | None, scale: float, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor
) -> None:
    """scale * (of_pi * softmax(z) - of_base * softmax(z_ref)), written over `z`.

    Args:
        z: see `softmax_sums`.
        z_ref: see `softmax_sums`.
        scale: factor on the logits.
        lse: log-sum-exp of the columns. Shape: (nodes,).
        base_lse: the same of the reference. Shape: (nodes,).
        of_pi: Shape: (nodes,).
        of_base: Shape: (nodes,).
    """
    rows, nodes = z.shape
    threads = torch.get_num_threads()
    _call("softmax_gradient", z, z_ref, rows, nodes, z.stride(0), scale, lse, base_lse, of_pi, of_base, threads)


def causal_softmax(scores: Tensor) -> None:
    """Attention weights, written over the scores of queries that are the last of the keys' positions.

    Args:
        scores: contiguous. Shape: (key heads, queries, heads per key head, keys).
    """
    _call("causal_softmax", scores, *scores.shape, torch.get_num_threads())


def softmax_backward(gradient: Tensor, weights: Tensor) -> None:
    """The gradient in the scores of a softmax, written over that in its weights.

    Args:
        gradient: contiguous. Shape: (..., keys).
        weights: contiguous. Shape as `gradient`.
    """
    keys = gradient.shape[-1]
    _call("softmax_backward", gradient, weights, gradient.numel() // keys, keys, torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / rms(x).

    Args:
        x: contiguous. Shape: (..., width).
        weight: Shape: (width,).
        epsilon: added to the mean square.
    """
    width, y = x.shape[-1], torch.empty_like(x)
    _call("rms_norm", x, weight, x.numel() // width, width, epsilon, y, torch.get_num_threads())
    return y


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None
) -> Tensor:
    """The gradient in `x` from that in the result of `rms_norm`, with something added. Shapes as there, contiguous."""
    width, grad_x = x.shape[-1], torch.empty_like(x)
    sizes = (x.numel() // width, width, epsilon)
    _call("rms_norm_backward", gradient, x, weight, added, *sizes, grad_x, None, torch.get_num_threads())
    return grad_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. Shape: (..., 2 * width), a gate and then what it lets through, contiguous; to (..., width)."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    _call("swiglu", gate_up, 2 * width, y.numel() // width, width, y, torch.get_num_threads())
    return y


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in `gate_up` from that in the result of `swiglu`. Shapes as there, contiguous."""
    width, grad = gradient.shape[-1], torch.empty_like(gate_up)
    sizes = (2 * width, gradient.numel() // width, width)
    _call("swiglu_backward", gradient, gate_up, *sizes, grad, None, torch.get_num_threads())
    return grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> None:
    """Rotary embedding of one sequence: x cos + (-x2, x1) sin, where x1 and x2 are the halves of a head.

    Args:
        x: each head's elements next to each other. Shape: (heads, tokens, width).
        cos: contiguous. Shape: (tokens, width).
        sin: contiguous. Shape: (tokens, width).
        y: filled with the result. Shape as `x`, strides as they may be; it may be `x`.
        backward: whether `x` is the gradient in the result, and `y` that in what was rotated.
    """
    strides_x, strides_y = x.stride()[:2], y.stride()[:2]
    _call("rotate", x, *strides_x, cos, sin, *x.shape, backward, y, *strides_y, torch.get_num_threads())


def dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """x / (1 - p) on elements kept at random, and 0 elsewhere; the same seed keeps the same ones.

    Args:
        x: contiguous. Shape: any.
        p: share dropped.
        seed: below 2^32.
        add_to: added to, if given, and returned. Shape as `x`.
    """
    y = torch.empty_like(x) if add_to is None else add_to
    _call("dropout", x, x.numel(), p, seed, add_to is not None, y, torch.get_num_threads())
    return y


@lru_cache
def _triton() -> ModuleType | None:
    """Comes with a torch for CUDA."""
    try:
        from buleyean_rl.kernels import triton
    except ImportError:
        return None
    return triton
