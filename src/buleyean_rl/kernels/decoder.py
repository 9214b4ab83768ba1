"""Decoder layers of Llama's form in one call, in bf16. See `layer.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int64, c_void_p
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import CuSeqlensStruct, Linear, _call_in
from buleyean_rl.kernels.attention import CuSeqlens

LINEARS = ("qkv", "output", "gate_up", "down")
SPARE = 32  # numbers after a row of some: rows some power of two apart drive each other from a cache


class Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass.

    Args:
        x: its input. Shape: (tokens, width).
        projected: queries, keys and values, turned; in one call, and something `SPARE`.
            Shape: (tokens, width of all heads).
        attended: what attention gave. Shape: (tokens, width of all queries' heads).
        middle: the input and what was added to it. Shape: (tokens, width).
        gate_up: gates and then what they let through; as much to spare. Shape: (tokens, 2 * hidden width).
        lse: log-sum-exps of the scores, in fp32, where attention gives them. Shape: (heads, tokens).
        lows: what the A's of the four linear layers made of their inputs. Shapes: (tokens, rank).
    """

    x: Tensor
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
    _fields_ = (("cosine", c_void_p), ("sine", c_void_p), ("tokens", c_int64), ("stretches", CuSeqlensStruct))


class _Kept(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "projected", "attended", "middle", "gate_up")),
        ("lows", c_void_p * len(LINEARS)),
        ("lse", c_void_p),
    )


class Layer(NamedTuple):
    """The weights of a layer.

    Args:
        linears: see `kernels.linear_of`. Queries, keys and values side by side; the output of attention; gates and
            what they let through, side by side; the last.
        norms: weights of the first and the second. Shapes: (width,).
        epsilons: theirs.
        heads: how many queries have, and keys.
        scale: factor on the scores.
    """

    linears: Sequence[Linear]
    norms: Sequence[Tensor]
    epsilons: Sequence[float]
    heads: tuple[int, int]
    scale: float

    @property
    def sizes(self) -> tuple[object, ...]:
        """What is alike in layers that are computed in one call."""
        return self.heads, *((linear.depth, linear.columns, linear.rank) for linear in self.linears)

    def in_c(self, head_width: int) -> _Layer:
        """As `layer.c` takes it; this has to outlive it."""
        norms = tuple(norm.data_ptr() for norm in self.norms)
        layer = _Layer(*self.linears, norms, tuple(self.epsilons), self.scale, *self.heads, head_width)
        for linear in (layer.qkv, layer.gate_up):
            linear.apart += SPARE
        return layer


class Layers:
    """Layers one after the other, and the row that goes through them.

    Args:
        layers: all of the same sizes.
        cos: contiguous. Shape: (tokens, head width).
        sin: contiguous. Shape: (tokens, head width).
        stretches: of the row.
    """

    def __init__(self, layers: Sequence[Layer], cos: Tensor, sin: Tensor, stretches: CuSeqlens) -> None:
        self._layers = layers
        self._memory = cos, sin, stretches  # which C is told the place of
        in_c = (_Layer * len(layers))(*(layer.in_c(cos.shape[-1]) for layer in layers))
        row = _Row(cos.data_ptr(), sin.data_ptr(), len(cos), stretches.in_c())
        self._in_c = in_c, len(layers), byref(row)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Kept]]:
        """The last one's result, and what `backward` needs of each, if it is to be kept.

        Args:
            x: contiguous. Shape: (tokens, width), as the result.
            keep: whether it is; otherwise the layers share the memory for it.
        """
        y, later = torch.empty_like(x), len(self._layers) - 1
        inputs = [torch.empty_like(x) for _ in range(later if keep else min(later, 2))]
        rooms = [self._room(x) for _ in range(later + 1 if keep else 1)]
        each_x = [x, *islice(cycle(inputs), later)]
        kept = [room._replace(x=own) for own, room in zip(each_x, cycle(rooms), strict=False)]
        _call_in(torch.bfloat16, "layers", *self._in_c, _in_c(kept), y, torch.get_num_threads())
        return y, kept

    def backward(self, gradient: Tensor, kept: Sequence[Kept], of_x: bool, grads: Sequence[Tensor]) -> Tensor | None:
        """The gradient in the first one's input, if it is wanted, from that in the last one's result.

        Those in the adapters of each linear layer of each layer are added to `grads`, see `kernels.adapted_backward`.
        """
        grad_x = torch.empty_like(gradient)
        places = (c_void_p * len(grads))(*(grad.data_ptr() for grad in grads))
        given = (*self._in_c, _in_c(kept), gradient, grad_x, of_x, places)
        _call_in(torch.bfloat16, "layers_backward", *given, torch.get_num_threads())
        return grad_x if of_x else None

    def _room(self, x: Tensor) -> Kept:
        """Memory for what is kept of one layer."""
        layer, tokens = self._layers[0], len(x)
        qkv, output, gate_up, _ = layer.linears
        projected, attended, gates = (
            x.new_empty(tokens, width) for width in (qkv.columns + SPARE, output.depth, gate_up.columns + SPARE)
        )
        lse = x.new_empty(layer.heads[0], tokens, dtype=torch.float32)
        lows = tuple(x.new_empty(tokens, linear.rank) for linear in layer.linears)
        return Kept(x, projected, attended, torch.empty_like(x), gates, lse, lows)


def _in_c(kept: Sequence[Kept]) -> ctypes.Array[_Kept]:
    return (_Kept * len(kept))(*map(_one_in_c, kept))


def _one_in_c(kept: Kept) -> _Kept:
    assert kept.lse is not None
    places, lows = [x.data_ptr() for x in kept[:5]], tuple(low.data_ptr() for low in kept.lows)
    return _Kept(*places, lows, kept.lse.data_ptr())
