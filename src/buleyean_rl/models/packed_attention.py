"""Attention over a packed row: each token sees its own path, and nothing else of the row.

    segments (which stretches see which) --segments_in_use--> packed_attention, called by every layer

Registered with transformers under `PACKED`. It is torch's own kernel, stretch by stretch; on a CPU the backward pass
is ours, block by block in batched matrix products, which is what its cores are fast at. Where it can be, it is a kernel
for stretches of many lengths: FlashAttention's on CUDA in half precision, ours on a CPU in bf16.

Rows that are padded, as those of answers are, attend by transformers' own function, under `PADDED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from buleyean_rl.kernels import attention
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.models.blockwise_attention import _add_gradients, _attend, _BlockwiseBackward
from buleyean_rl.models.segments import (
    AttentionSegment,
    Segment,
    _lengths,
    _stretches,
    active_segments,
    segments_in_use,
)

PACKED = "buleyean_packed"
PADDED = "buleyean_padded"
UNKNOWN = ("softcap", "s_aux", "position_bias")
FLASH_TYPES = (torch.bfloat16, torch.float16)
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def packed_attention(
    module: torch.nn.Module | None,  # noqa: ARG001 - the signature is transformers'
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
    before = _before(query, key)
    segments = active_segments() or (Segment(query.shape[2], ((0, before),) if before else ()),)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and dropout == 0 and query.dtype in FLASH_TYPES and len(query) == 1:
        return _attend_at_once(query, key, value, _lengths(segments, before, query.device), scale, sliding_window), None
    stretches = _stretches(segments, before)
    if query.device.type == "cpu" and dropout == 0 and not _windowed(stretches, sliding_window):
        if len(query) == 1 and attention.attends(query, query.shape[2], query.shape[3]):
            return _TiledAttention.apply(query, key, value, Row(segments, scale, sliding_window)), None
        return _BlockwiseBackward.apply(query, key, value, stretches, scale), None
    return _attend(query, key, value, stretches, scale, dropout, sliding_window), None


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Within, the attention of a model of this configuration is another, one that transformers knows by name."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def padded_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, of rows that may be padded; in fp32 where torch is slow in their type. Shapes as there."""
    dtype = query.dtype
    if bf16_is_emulated(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output.to(dtype), weights


class Row(NamedTuple):
    """What a packed row attends by, for a node of autograd's graph.

    Args:
        segments: of the row.
        scale: factor on the scores.
        sliding_window: see `packed_attention`.
    """

    segments: tuple[Segment, ...]
    scale: float
    sliding_window: int | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """`packed_attention` of one row, and what `back` is to be given of it.

        Args:
            query: Shape: (1, heads, tokens, head width).
            key: Shape: (1, key heads, tokens, head width).
            value: Shape as `key`.
        """
        stretches = self.in_tiles(query, query.shape[2], query.shape[3], _before(query, key))
        if stretches is not None:
            y, lse = attention.attention(query[0], key[0], value[0], stretches, self.scale)
            return y.unsqueeze(0), lse
        with torch.no_grad():
            return self._by_graph(query, key, value), None

    def back(
        self,
        gradient: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        lse: Tensor | None,
        into: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Fill `into` with the gradients in queries, keys and values.

        Args:
            gradient: in the output.
            inputs: of `attend`.
            output: of it.
            lse: what it gave.
            into: Shapes as those of `inputs`.
        """
        (query, key, value), (grad_query, grad_key, grad_value) = ((x[0] for x in each) for each in (inputs, into))
        grads, before = (grad_query, grad_key, grad_value), _before(*inputs[:2])
        if lse is not None:
            stretches = _lengths(self.segments, before, gradient.device)
            attention.attention_backward(gradient[0], query, key, value, output[0], lse, stretches, self.scale, *grads)
        elif gradient.device.type == "cpu" and not self._is_windowed(before):
            grad_key.zero_()
            grad_value.zero_()
            _add_gradients(query, key, value, gradient[0], *grads, _stretches(self.segments, before), self.scale)
        else:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                found = torch.autograd.grad(self._by_graph(*leaves), leaves, gradient)
            for x, grad in zip(into, found, strict=True):
                x.copy_(grad)

    def in_tiles(self, like: Tensor, tokens: int, width: int, before: int = 0) -> attention.CuSeqlens | None:
        """What `kernels.attention` takes, where it is to compute.

        Args:
            like: numbers of the type and on the device that compute.
            tokens: of the row.
            width: of a head.
            before: keys of earlier calls, in generation.
        """
        if not attention.attends(like, tokens, width) or self._is_windowed(before):
            return None
        return _lengths(self.segments, before, like.device)

    def _by_graph(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with segments_in_use(self.segments):
            return packed_attention(None, query, key, value, None, self.scale, sliding_window=self.sliding_window)[0]

    def _is_windowed(self, before: int) -> bool:
        return _windowed(_stretches(self.segments, before), self.sliding_window)


def row_in_use(tokens: int, scale: float, sliding_window: int | None) -> Row:
    """How a row of so many tokens attends within `segments_in_use`; otherwise it is an ordinary causal row."""
    return Row(active_segments() or (Segment(tokens),), scale, sliding_window)


def _before(query: Tensor, key: Tensor) -> int:
    """How many keys are of earlier calls, in generation."""
    return key.shape[2] - query.shape[2]


def _windowed(stretches: list[AttentionSegment], sliding_window: int | None) -> bool:
    """Whether some token does not see all that is before it."""
    return sliding_window is not None and any(stretch.seen > sliding_window for stretch in stretches)


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, lengths: attention.CuSeqlens, scale: float, sliding_window: int | None
) -> Tensor:
    """All stretches in one call; of each the last query sees all its keys. Shapes as for `packed_attention`."""
    q, k, v = (row[0].transpose(0, 1) for row in (query, key, value))
    if lengths.keys is not None:
        k, v = k.index_select(0, lengths.keys), v.index_select(0, lengths.keys)
    back = -1 if sliding_window is None else sliding_window - 1
    output = varlen_attn(q, k, v, *lengths[1:], scale=scale, window_size=(back, 0), **GROUPED)
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


class _TiledAttention(torch.autograd.Function):
    """All stretches of a row in one call of `kernels.attention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Row) -> Tensor:
        """Shapes as for `packed_attention`, of one row."""
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        value = value.contiguous()  # a view would keep all that its projection made
        output, lse = row.attend(query, key, value)
        ctx.save_for_backward(query, key, value, output, lse)  # the layer that comes next keeps its input anyway
        ctx.row = row
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        ctx.row.back(grad_output.contiguous(), (query, key, value), output, lse, grads)
        return (*grads, None)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
AttentionInterface.register(PADDED, padded_attention)
AttentionMaskInterface.register(PADDED, sdpa_mask)
