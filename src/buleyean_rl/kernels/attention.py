"""Causal attention over a packed sequence, in bf16."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import STEP, CuSeqlensStruct, Heads, _call_in, _has_tiles, available
from buleyean_rl.kernels.matmul import least_rows


class CuSeqlens(NamedTuple):
    """Which tokens of a packed row see which: the queries of a stretch are the last of the keys they see.

    Args:
        keys: places in the row that each stretch sees, one stretch after the other; None for the row as it is.
        cu_seqlens_q: where each stretch's queries end, and 0 before, in int32. Shape: (stretches + 1,).
        cu_seqlens_k: the same of `keys`.
        max_seqlen_q: of a stretch.
        max_seqlen_k: of a stretch.
    """

    keys: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def in_c(self) -> ctypes.Structure:
        """As `attention.c` takes it; this has to outlive it."""
        pointers = (None if x is None else x.data_ptr() for x in self[:3])
        return CuSeqlensStruct(*pointers, len(self.cu_seqlens_q) - 1, self.max_seqlen_q)


def attends(like: Tensor, tokens: int, width: int) -> bool:
    """Whether `attention` can be used on heads of some width, in numbers like these, and is quick: on enough tokens."""
    fits = like.dtype == torch.bfloat16 and width % STEP == 0 and tokens >= least_rows(like)
    return fits and available(like) and _has_tiles()


def attention(query: Tensor, key: Tensor, value: Tensor, stretches: CuSeqlens, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a packed row, in bf16.

    Args:
        query: a head's elements next to each other, a multiple of 32. Shape: (heads, tokens, width).
        key: alike. Shape: (key heads, tokens, width).
        value: Shape as `key`.
        stretches: of the row.
        scale: factor on the scores.

    Returns:
        Shape: (tokens, heads, width). And log-sum-exps of the scores, in fp32. Shape: (heads, tokens).
    """
    heads, tokens, width = query.shape
    y, lse = query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)
    rows = (Heads.of(x) for x in (query, key, value, y.transpose(0, 1)))
    _call_in(torch.bfloat16, "attention", *rows, lse, width, stretches.in_c(), scale, torch.get_num_threads())
    return y, lse


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    stretches: CuSeqlens,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """The gradients of `attention` in queries, keys and values, from that in its result `y`. Shapes as there.

    Filled with them are the last three, whose strides may be any that those of queries may.
    """
    inputs = (Heads.of(x) for x in (query, key, value, y.transpose(0, 1)))
    given = (lse, Heads.of(gradient.transpose(0, 1)), key.shape[-1], stretches.in_c(), scale)
    grads = (Heads.of(x) for x in (grad_query, grad_key, grad_value))
    _call_in(torch.bfloat16, "attention_backward", *inputs, *given, *grads, torch.get_num_threads())
