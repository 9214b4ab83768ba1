"""Causal attention over a packed sequence, in bf16."""

from __future__ import annotations

from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import BLOCK, AttentionArgs, CuSeqlensStruct, Heads, available, call
from buleyean_rl.kernels.matmul import min_rows


class CuSeqlens(NamedTuple):
    """Which tokens of a packed sequence see which: the queries of a segment are the last of the keys they see.

    Args:
        keys: tokens that each segment sees, one segment after the other; None for the sequence as it is.
        cu_seqlens_q: where each segment's queries end, and 0 before, in int32. Shape: (segments + 1,).
        cu_seqlens_k: the same of `keys`.
        max_seqlen_q: of a segment.
        max_seqlen_k: of a segment.
    """

    keys: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def as_struct(self) -> CuSeqlensStruct:
        """As `kernels.h` has it; this has to outlive it."""
        pointers = (None if x is None else x.data_ptr() for x in self[:3])
        return CuSeqlensStruct(*pointers, len(self.cu_seqlens_q) - 1)


def attention_available(like: Tensor, tokens: int, width: int) -> bool:
    """Whether `attention` can be used on heads of some width, in numbers like these, and is quick: on enough tokens."""
    return width % BLOCK == 0 and available(like) and tokens >= min_rows(like)


def attention(query: Tensor, key: Tensor, value: Tensor, seqlens: CuSeqlens, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a packed sequence, in bf16.

    Args:
        query: a head's elements next to each other, a multiple of 32. Shape: (heads, tokens, width).
        key: alike. Shape: (key heads, tokens, width).
        value: Shape as `key`.
        seqlens: of the sequence.
        scale: factor on the scores.

    Returns:
        Shape: (tokens, heads, width). And log-sum-exps of the scores, in fp32. Shape: (heads, tokens).
    """
    heads, tokens, width = query.shape
    y, lse = query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)
    inputs = (Heads.of(x) for x in (query, key, value, y.transpose(0, 1)))
    grads = [Heads()] * 4
    call("attention", byref(AttentionArgs(*inputs, *grads, lse.data_ptr(), width, seqlens.as_struct(), scale)))
    return y, lse


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    seqlens: CuSeqlens,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """The gradients of `attention` in queries, keys and values, from that in its result `y`. Shapes as there.

    Filled with them are the last three, whose strides may be any that those of queries may.
    """
    by_token = (y.transpose(0, 1), gradient.transpose(0, 1))
    heads = (Heads.of(x) for x in (query, key, value, *by_token, grad_query, grad_key, grad_value))
    call("attention_backward", byref(AttentionArgs(*heads, lse.data_ptr(), key.shape[-1], seqlens.as_struct(), scale)))
