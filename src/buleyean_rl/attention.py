"""Attention over a packed row: each token sees its own path, and nothing else of the row.

    segments (which stretches see which) --segments_in_use--> packed_attention, called by every layer

Registered with transformers under `PACKED`. On a CPU the work is done block by block in batched matrix
products, which is what its cores are fast at; elsewhere by torch's own kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "buleyean_packed"
UNKNOWN = ("softcap", "s_aux", "position_bias")
BLOCK = 64  # queries; measured on bf16 against 32, 128 and 256


@dataclass(frozen=True)
class Segment:
    """A stretch of a packed row that attends as one: its tokens follow each other on one path.

    Args:
        length: how many tokens; segments tile the row in order.
        context: earlier stretches of the row, [start, end), that every token of this one can see.
    """

    length: int
    context: tuple[tuple[int, int], ...] = ()


_segments: ContextVar[tuple[Segment, ...] | None] = ContextVar("segments", default=None)


@contextmanager
def segments_in_use(segments: tuple[Segment, ...] | None) -> Iterator[None]:
    """Let attention within follow these segments; None for an ordinary causal row.

    transformers hands an attention function only what the model's own code passes down, which differs
    from model to model; the segments travel beside it.
    """
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001 - the signature is transformers'
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a packed row, and from it to its context.

    Args:
        module: the attention layer, not used.
        query: Shape: (1, heads, tokens, head width).
        key: Shape: (1, key heads, tokens, head width).
        value: Shape as `key`.
        attention_mask: not used; the segments say it all.
        scaling: factor on the scores.
        dropout: on the attention weights.
        sliding_window: how many tokens back a token sees, itself included; None for all.
        others: what else the model passes; none of it may be of `UNKNOWN`.

    Returns:
        Shape: (1, tokens, heads, head width), and None for the weights.

    Raises:
        NotImplementedError: the model does more to its scores than this function knows.
    """
    if any(others.get(name) is not None for name in UNKNOWN):
        raise NotImplementedError("packed attention knows no soft-capping, sinks or position biases")
    segments = _segments.get()
    if segments is None:  # generation, or a plain forward pass: an ordinary causal row
        segments = (Segment(query.shape[2]),)
    lengths = [segment.length for segment in segments]
    outputs = []
    for segment, q, k, v in zip(
        segments, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    ):
        if segment.context:
            k = torch.cat([*(key[:, :, a:b] for a, b in segment.context), k], 2)
            v = torch.cat([*(value[:, :, a:b] for a, b in segment.context), v], 2)
        if q.device.type == "cpu" and dropout == 0 and (sliding_window is None or sliding_window >= k.shape[2]):
            outputs.append(blockwise_attention(q, k, v, scaling))
            continue
        mask = _mask(segment.length, k.shape[2], sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Causal attention for the CPU: blocks of queries against only the keys they see.

    In bf16, forward and backward together take about 0.6 of the time of torch's own kernel. The weights of
    a block are computed again in the backward pass, so nothing of size queries x keys is kept.

    Args:
        query: the last of the keys' positions. Shape: (rows, heads, queries, head width).
        key: Shape: (rows, key heads, keys, head width), keys >= queries; heads is a multiple of key heads.
        value: Shape as `key`.
        scaling: factor on the scores; 1 / sqrt(head width) if None.

    Returns:
        Shape as `query`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = zip(query, key, value, strict=True)
    return torch.stack([_BlockwiseAttention.apply(q, k, v, scaling) for q, k, v in rows])


class _BlockwiseAttention(torch.autograd.Function):
    """One row. The heads that share a key head are stacked, so that each product is one batched matmul."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query = query * scaling
        output = torch.empty_like(query)
        for block, seen in _blocks(query, key):
            weights = _weights(query[:, block], key[:, :seen])
            output[:, block] = torch.bmm(weights, value[:, :seen]).view_as(output[:, block])
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, seen in _blocks(query, key):
            k, v = key[:, :seen], value[:, :seen]
            q, grad = _stack(query[:, block], key), _stack(grad_output[:, block], key)
            weights = _weights(query[:, block], k)
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, block] = torch.bmm(grad_scores, k).view_as(grad_query[:, block])
            grad_key[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), q)
            grad_value[:, :seen] += torch.bmm(weights.transpose(1, 2), grad)
        return grad_query.mul_(ctx.scaling), grad_key, grad_value, None


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many keys the last query of each sees."""
    queries, before = query.shape[1], key.shape[1] - query.shape[1]
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        yield slice(start, end), before + end


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention weights of a block whose last query sees every key.

    Shape: (heads, queries, width) and (key heads, keys, width) to (key heads, stacked queries, keys).
    """
    scores = torch.bmm(_stack(query, key), key.transpose(1, 2))
    queries = query.shape[1]
    corner = scores.view(key.shape[0], -1, queries, key.shape[1])[..., -queries:]
    corner.masked_fill_(_future(queries), float("-inf"))
    return scores.softmax(-1)


def _stack(query: Tensor, key: Tensor) -> Tensor:
    """(heads, queries, width) to (key heads, heads per key head * queries, width)."""
    return query.reshape(key.shape[0], -1, query.shape[-1])


@lru_cache(maxsize=BLOCK)
def _future(queries: int) -> Tensor:
    return torch.ones(queries, queries, dtype=torch.bool).triu(1)


def _mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, the queries being the last of the keys; None for plain causal."""
    if queries == keys and (sliding_window is None or sliding_window >= keys):
        return None
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
