"""torch's attention with a backward pass by blocks of queries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from buleyean_rl.kernels import abi, elementwise
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.models.segments import ROUND, AttentionSegment, _gather

BLOCK = 256  # queries; measured against 64, 128 and 512


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: list[AttentionSegment],
    scale: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """torch's own attention, stretch by stretch. Shapes as for `packed_attention`."""
    outputs = []
    for stretch in stretches:
        q, k, v = query[:, :, stretch.queries], _gather(key, stretch), _gather(value, stretch)
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        if bf16_is_emulated(q):
            q, k, v = (x.float() for x in (q, k, v))
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=True)
        )
    output = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return output.to(query.dtype).transpose(1, 2).contiguous()


class _BlockwiseBackward(torch.autograd.Function):
    """torch's own attention with another backward pass, which takes half the time of torch's on a CPU.

    It goes by blocks of queries against only the keys they see, whose weights it computes again. The heads that share
    a key head are stacked, so that each product is one batched matmul.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, stretches: list[AttentionSegment], scale: float
    ) -> Tensor:
        """Shapes as for `packed_attention`."""
        value = value.contiguous()  # a view would keep all that its projection made
        ctx.save_for_backward(query, key, value)
        ctx.stretches, ctx.scale = stretches, scale
        return _attend(query, key, value, stretches, scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for row in range(len(query)):
            inputs = query[row], key[row], value[row], grad_output[row]
            _add_gradients(*inputs, grad_query[row], grad_key[row], grad_value[row], ctx.stretches, ctx.scale)
        return grad_query, grad_key, grad_value, None, None


def _add_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    stretches: list[AttentionSegment],
    scale: float,
) -> None:
    """The gradients of one row: that in its queries written, those in its keys and values added.

    Shapes: (heads, queries, width), (key heads, keys, width) twice and (queries, heads, width); again the first three.
    """
    group = len(query) // len(key)
    for stretch in stretches:
        rows = stretch.queries.stop - stretch.queries.start
        filling = -rows % ROUND
        k, v = (_filled(_gather(x, stretch), filling) for x in (key, value))
        # (key heads, queries, group, width)
        q = _filled(query[:, stretch.queries].unflatten(0, (-1, group)).transpose(1, 2), filling)
        grad_o = _filled(grad_output[stretch.queries].unflatten(1, (-1, group)).transpose(0, 1), filling)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        q *= scale
        for start in range(0, rows, BLOCK):
            block = slice(start, min(start + BLOCK, q.shape[1]))
            seen = k.shape[1] - (q.shape[1] - block.stop)
            weights = _weights(q[:, block], k[:, :seen])
            grad = _stacked(grad_o[:, block])
            grad_scores = _softmax_backward(torch.bmm(grad, v[:, :seen].transpose(1, 2)), weights)
            torch.bmm(grad_scores, k[:, :seen], out=_stacked(grad_q[:, block]))
            grad_k[:, :seen].baddbmm_(grad_scores.transpose(1, 2), _stacked(q[:, block]))
            grad_v[:, :seen].baddbmm_(weights.transpose(1, 2), grad)
        torch.mul(grad_q[:, :rows].transpose(1, 2).flatten(0, 1), scale, out=grad_query[:, stretch.queries])
        sizes = [*(piece.stop - piece.start for piece in stretch.keys), filling]
        for piece, piece_k, piece_v in zip(stretch.keys, grad_k.split(sizes, 1), grad_v.split(sizes, 1), strict=False):
            grad_key[:, piece] += piece_k
            grad_value[:, piece] += piece_v


def _filled(x: Tensor, filling: int) -> Tensor:
    """A contiguous copy with zeros at the end of its second dimension."""
    copy = x.new_empty(x.shape[0], x.shape[1] + filling, *x.shape[2:])
    copy[:, : x.shape[1]] = x
    copy[:, x.shape[1] :] = 0
    return copy


def _stacked(block: Tensor) -> Tensor:
    """A view. Shape: (key heads, queries, group, width) to (key heads, queries * group, width)."""
    return block.view(len(block), -1, block.shape[-1])


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention weights of a block whose last query sees every key.

    Shape: (key heads, queries, group, width) and (key heads, keys, width) to (key heads, queries * group, keys).
    """
    scores = torch.bmm(_stacked(query), key.transpose(1, 2))
    of_queries = scores.view(*query.shape[:3], -1)
    if abi.available(scores):
        elementwise.causal_softmax(of_queries)
        return scores
    queries = query.shape[1]
    of_queries[..., -queries:].masked_fill_(_future(queries), float("-inf"))
    return scores.softmax(-1)


def _softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient in the scores from that in the weights, which it may overwrite. Shape: both alike."""
    if abi.available(gradient):
        elementwise.softmax_backward(gradient, weights)
        return gradient
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


@lru_cache(maxsize=BLOCK)
def _future(queries: int) -> Tensor:
    return torch.ones(queries, queries, dtype=torch.bool).triu(1).unsqueeze(1)


def _mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, the queries being the last of the keys; None for plain causal."""
    if queries == keys and (sliding_window is None or sliding_window >= keys):
        return None
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
