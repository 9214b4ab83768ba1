"""A decoder layer of Llama's form in one call, in bf16 where a processor has matrix registers. See `layer.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels import Linear, Stretches, _call_in, _Stretches

LINEARS = ("qkv", "output", "gate_up", "down")


class Kept(NamedTuple):
    """What a backward pass needs of a forward pass beside its input.

    Args:
        projected: queries, keys and values, turned. Shape: (tokens, width of all heads).
        attended: what attention gave. Shape: (tokens, width of all queries' heads).
        middle: the input and what was added to it. Shape: (tokens, width).
        gate_up: gates and then what they let through. Shape: (tokens, 2 * hidden width).
        lse: log-sum-exps of the scores, in fp32, where attention gives them. Shape: (heads, tokens).
        lows: what the A's of the four linear layers made of their inputs. Shapes: (tokens, rank).
    """

    projected: Tensor
    attended: Tensor
    middle: Tensor
    gate_up: Tensor
    lse: Tensor | None
    lows: tuple[Any, ...]


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in LINEARS),
        ("norms", c_void_p * 2),
        ("epsilons", c_float * 2),
        ("scale", c_float),
        *((name, c_int64) for name in ("heads", "key_heads", "head_width")),
    )


class _Row(ctypes.Structure):
    _fields_ = (("cosine", c_void_p), ("sine", c_void_p), ("tokens", c_int64), ("stretches", _Stretches))


class _Kept(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("projected", "attended", "middle", "gate_up")),
        ("lows", c_void_p * len(LINEARS)),
        ("lse", c_void_p),
    )


class Layer:
    """A layer and the row that goes through it.

    Args:
        linears: see `kernels.linear_of`. Queries, keys and values side by side; the output of attention; gates and
            what they let through, side by side; the last.
        norms: weights of the first and the second. Shapes: (width,).
        epsilons: theirs.
        heads: how many queries have, and keys.
        scale: factor on the scores.
        cos: contiguous. Shape: (tokens, head width).
        sin: contiguous. Shape: (tokens, head width).
        stretches: of the row.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        norms: Sequence[Tensor],
        epsilons: Sequence[float],
        heads: tuple[int, int],
        scale: float,
        cos: Tensor,
        sin: Tensor,
        stretches: Stretches,
    ) -> None:
        weights = tuple(norm.data_ptr() for norm in norms)
        self._linears, self._heads = linears, heads[0]
        self._memory = norms, cos, sin, stretches  # which C is told the place of
        layer = _Layer(*linears, weights, tuple(epsilons), scale, *heads, cos.shape[-1])
        row = _Row(cos.data_ptr(), sin.data_ptr(), len(cos), stretches.in_c())
        self._in_c = byref(layer), byref(row)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The layer's result, and what `backward` needs. Shape: (tokens, width), contiguous, to the same."""
        qkv, output, gate_up, _ = self._linears
        lows = tuple(x.new_empty(len(x), linear.rank) for linear in self._linears)
        attended, middle = x.new_empty(len(x), output.depth), torch.empty_like(x)
        lse = x.new_empty(self._heads, len(x), dtype=torch.float32)
        projected, gates = x.new_empty(len(x), qkv.columns), x.new_empty(len(x), gate_up.columns)
        kept, y = Kept(projected, attended, middle, gates, lse, lows), torch.empty_like(x)
        _call_in(torch.bfloat16, "layer", *self._in_c, x, byref(_in_c(kept)), y, torch.get_num_threads())
        return y, kept

    def backward(self, gradient: Tensor, x: Tensor, kept: Kept, of_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients in `x`, if it is wanted, and in each linear layer's adapters, from that in the result.

        Those in adapters are as `kernels.adapted_backward` gives them.
        """
        grad_x = torch.empty_like(x) if of_x else None
        grads = [torch.empty(linear.learning) for linear in self._linears]
        places = (c_void_p * len(grads))(*(grad.data_ptr() for grad in grads))
        given = (*self._in_c, x, byref(_in_c(kept)), gradient)
        _call_in(torch.bfloat16, "layer_backward", *given, grad_x, places, torch.get_num_threads())
        return grad_x, grads


def _in_c(kept: Kept) -> _Kept:
    assert kept.lse is not None
    places, lows = [x.data_ptr() for x in kept[:4]], tuple(low.data_ptr() for low in kept.lows)
    return _Kept(*places, lows, kept.lse.data_ptr())
