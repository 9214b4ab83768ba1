"""Linear layers with LoRA adapters, and the output head's softmax, in bf16."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import STEP, Linear, _call, _call_in, _has_matrix_registers, _has_tiles, available
from buleyean_rl.kernels.precision import bf16_is_emulated


class Adapter(NamedTuple):
    """Adapters of layers side by side: their a's on top of each other, their b's along a diagonal.

    Args:
        a: contiguous. Shape: (rank, inputs).
        b: contiguous, scaled. Shape: (outputs, rank).
        ranks: of each layer.
        outputs: of each layer.
        scalings: of each layer, which are in `b`.
    """

    a: Tensor
    b: Tensor
    ranks: Sequence[int]
    outputs: Sequence[int]
    scalings: Sequence[float]


def multiplies(*matrices: Tensor) -> bool:
    """Whether `adapted` can be used with these matrices, and is quick on `least_rows` or more."""
    fit = all(x.dtype == torch.bfloat16 and not x.shape[-1] % STEP for x in matrices)
    return fit and available(*matrices) and _has_tiles()


def least_rows(x: Tensor) -> int:
    """How many rows `adapted` and `attention` are to be given, of a type, for torch not to be quicker."""
    return 1 if bf16_is_emulated(x) else STEP


def depth_of(size: int, x: Tensor) -> int:
    """What a matrix that multiplies ones like `x` is to be filled up to, with zeros."""
    return _filled(size) if x.dtype == torch.bfloat16 and available(x) and _has_tiles() else size


def linear_of(weight: Tensor, adapter: Adapter | None = None) -> Linear:
    """A linear layer and its adapter for `adapted`, where `multiplies` says so; they have to outlive it.

    Args:
        weight: contiguous. Shape: (outputs, inputs).
        adapter: of one to three layers side by side.
    """
    columns, depth = weight.shape
    if adapter is None:
        return Linear(weight.data_ptr(), depth=depth, columns=columns, apart=columns)
    a, b, *parts = adapter
    places = (x.data_ptr() for x in (weight, a, b))
    return Linear(*places, depth, columns, columns, len(a), 0.0, 0, len(adapter.ranks), *map(tuple, parts))


def copy_adapters(linears: Sequence[tuple[Linear, Sequence[Tensor]]]) -> None:
    """Let the a's and b's of linear layers be the A's and B's that go with them, the latter scaled.

    Args:
        linears: see `linear_of`; A and B of each of its parts, in fp32 and contiguous.
    """
    places = [parameter.data_ptr() for _, parameters in linears for parameter in parameters]
    of_each = (ctypes.POINTER(Linear) * len(linears))(*(ctypes.pointer(linear) for linear, _ in linears))
    given = of_each, len(linears), (c_void_p * len(places))(*places), torch.get_num_threads()
    _call_in(torch.bfloat16, "copy_adapters", *given)


def adapted(x: Tensor, linear: Linear, added: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x weight^T + low b^T + added, where low = dropout(x) a^T, in bf16.

    Args:
        x: contiguous. Shape: (rows, inputs).
        linear: see `linear_of`.
        added: contiguous. Shape: (rows, outputs).

    Returns:
        The result and, with an adapter, `low`. Shapes: (rows, outputs), (rows, rank).
    """
    y = x.new_empty(len(x), linear.columns)
    low = x.new_empty(len(x), linear.rank) if linear.a else None
    _call_in(torch.bfloat16, "adapted", linear, x, added, len(x), low, y, torch.get_num_threads())
    return y, low


def adapted_backward(
    gradient: Tensor, x: Tensor, linear: Linear, low: Tensor, of_x: bool, grads: Tensor
) -> Tensor | None:
    """The gradient of `adapted` in `x`, if it is wanted, from that in its result; those in its adapters are added.

    Args:
        gradient: contiguous. Shape: (rows, outputs).
        x: contiguous. Shape: (rows, inputs).
        linear: see `linear_of`.
        low: what `adapted` gave. Shape: (rows, rank).
        of_x: whether the gradient in `x` is wanted.
        grads: those in each part's A, (rank, inputs), and B, (outputs, rank), one after the other, its scaling's factor
            in the latter; in fp32, added to. Shape: (`linear.learning`,).
    """
    grad_x = torch.empty_like(x) if of_x else None
    _call_in(
        torch.bfloat16, "adapted_backward", linear, gradient, x, low, len(x), grad_x, grads, torch.get_num_threads()
    )
    return grad_x


def has_head_sums(weight: Tensor) -> bool:
    """Whether `head_sums` can be used with an output head, and is quick. Shape: (vocabulary, width).

    It takes a product more than logits do, which has to be cheaper than torch's.
    """
    return not weight.shape[0] % STEP and multiplies(weight) and (bf16_is_emulated(weight) or _has_matrix_registers())


def head_sums(
    weight: Tensor, hidden: Tensor, scale: float, tokens: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a softmax over the vocabulary, what its normaliser and its gradient are made of, in bf16, in one pass.

    Args:
        weight: W of the output head, contiguous. Shape: (vocabulary, width).
        hidden: contiguous. Shape: (nodes, width).
        scale: factor on the logits.
        tokens: that do not count. Shape: (entries,).
        nodes: at which they do not, sorted. Shape: (entries,).

    Returns:
        In fp32: one of each node's largest logits; sum e^z, exponents less that; the mean of W's rows by e^z. Shapes:
        (nodes,), (nodes,), (nodes, width).
    """
    most, total, mean = torch.empty(len(hidden)), torch.empty(len(hidden)), torch.empty(hidden.shape)
    rejected = (tokens, nodes, len(tokens))
    threads = torch.get_num_threads()
    _call("head_sums", weight, *weight.shape, hidden, len(hidden), scale, *rejected, most, total, mean, threads)
    return most, total, mean


def _filled(size: int) -> int:
    return math.ceil(size / STEP) * STEP
