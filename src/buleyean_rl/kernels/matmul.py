"""Linear layers with LoRA, and the output head's softmax, in bf16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import BLOCK, HeadSoftmaxArgs, Linear, address, available, call
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.kernels.quantised import QuantisedTensor, quantised_address


class Adapter(NamedTuple):
    """LoRA adapters of layers side by side: their A's on top of each other, their B's along a diagonal.

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


def gemm_available(*matrices: Tensor) -> bool:
    """Whether `lora_linear` can be used with these matrices, and is fast on `min_rows` or more."""
    return not any(x.shape[-1] % BLOCK or not _is_readable(x) for x in matrices) and available(*matrices)


def _is_readable(x: Tensor) -> bool:
    return not isinstance(x, QuantisedTensor) or x.fits_kernels


def min_rows(x: Tensor) -> int:
    """How many rows, of a tensor's type, it takes for `lora_linear` and `attention` to be faster than torch."""
    return 1 if bf16_is_emulated(x) else BLOCK


def padded_depth(size: int, x: Tensor) -> int:
    """What a matrix that multiplies ones like `x` is to be padded to, with zeros."""
    return math.ceil(size / BLOCK) * BLOCK if available(x) else size


def make_linear(weight: Tensor, adapter: Adapter | None = None, bias: Tensor | None = None) -> Linear:
    """A linear layer and its adapter for `lora_linear`, where `gemm_available`; the tensors have to outlive it.

    Args:
        weight: contiguous, or quantised. Shape: (outputs, inputs).
        adapter: of one to three layers side by side.
        bias: contiguous. Shape: (outputs,).
    """
    columns, depth = weight.shape
    linear = Linear(weight.data_ptr(), address(bias), depth=depth, columns=columns, y_stride=columns)
    if adapter is not None:
        a, b, *parts = adapter
        pointers = map(address, (weight, bias, a, b))
        linear = Linear(*pointers, depth, columns, columns, len(a), len(adapter.ranks), *map(tuple, parts))
    linear.quantised = quantised_address(weight)
    return linear


def lora_linear(x: Tensor, linear: Linear, added: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x weight^T + lora_hidden b^T + added, where lora_hidden = x a^T, in bf16.

    Args:
        x: contiguous. Shape: (rows, inputs).
        linear: see `make_linear`.
        added: in place of its bias, contiguous. Shape: (rows, outputs).

    Returns:
        The result and, with an adapter, lora_hidden. Shapes: (rows, outputs), (rows, rank).
    """
    y = x.new_empty(len(x), linear.columns)
    lora_hidden = x.new_empty(len(x), linear.rank) if linear.a else None
    call("lora_linear", byref(linear), x, added, len(x), lora_hidden, y)
    return y, lora_hidden


def lora_linear_backward(
    grad_y: Tensor, x: Tensor, linear: Linear, lora_hidden: Tensor, needs_grad_x: bool, grads: Tensor
) -> Tensor | None:
    """The gradient of `lora_linear` in `x`, if it is needed, from that in its result; those in its adapters are added.

    Args:
        grad_y: contiguous. Shape: (rows, outputs).
        x: contiguous. Shape: (rows, inputs).
        linear: see `make_linear`.
        lora_hidden: what `lora_linear` returned. Shape: (rows, rank).
        needs_grad_x: whether the gradient in `x` is needed.
        grads: those in each part's A, (rank, inputs), and B, (outputs, rank), one after the other, its scaling's factor
            in the latter; in fp32, accumulated in place. Shape: (`linear.adapter_size`,).
    """
    grad_x = torch.empty_like(x) if needs_grad_x else None
    grad_hidden = torch.empty_like(lora_hidden)
    call("lora_linear_input_gradient", byref(linear), grad_y, len(x), grad_hidden, grad_x)
    call("lora_linear_weight_gradients", byref(linear), grad_y, x, lora_hidden, grad_hidden, len(x), grads)
    return grad_x


def linear_input_gradient(grad_y: Tensor, linear: Linear) -> Tensor:
    """The gradient in its input of a linear layer without an adapter, from that in its result, in bf16.

    Args:
        grad_y: contiguous. Shape: (rows, outputs).
        linear: see `make_linear`.

    Returns:
        Shape: (rows, inputs).
    """
    grad_x = grad_y.new_empty(len(grad_y), linear.depth)
    call("lora_linear_input_gradient", byref(linear), grad_y, len(grad_y), None, grad_x)
    return grad_x


def head_softmax_available(weight: Tensor) -> bool:
    """Whether `head_softmax` can be used with an output head. Shape: (vocabulary, width)."""
    return not weight.shape[0] % BLOCK and gemm_available(weight)


def head_softmax(
    weight: Tensor, hidden: Tensor, scale: float, rejected_tokens: Tensor, rejected_nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the normaliser and the gradient of a softmax over the vocabulary are made of, in one pass, in bf16.

    Args:
        weight: W of the output head, contiguous, or quantised. Shape: (vocabulary, width).
        hidden: contiguous. Shape: (nodes, width).
        scale: factor on the logits.
        rejected_tokens: left out of the softmax. Shape: (entries,).
        rejected_nodes: at which they are, sorted. Shape: (entries,).

    Returns:
        In fp32: row_max, one of each node's largest logits; sum_exp, sum e^(z - row_max); the mean of W's rows by e^z.
        Shapes: (nodes,), (nodes,), (nodes, width).
    """
    row_max, sum_exp, mean = torch.empty(len(hidden)), torch.empty(len(hidden)), torch.empty(hidden.shape)
    tensors = (weight, hidden, rejected_tokens, rejected_nodes, row_max, sum_exp, mean)
    sizes = (*weight.shape, len(hidden), len(rejected_tokens))
    pointers = (x.data_ptr() for x in tensors)
    call("head_softmax", byref(HeadSoftmaxArgs(*pointers, *sizes, scale, quantised_address(weight))))
    return row_max, sum_exp, mean
