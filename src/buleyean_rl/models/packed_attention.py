"""Attention over a packed sequence: each token sees its own path, and nothing else of the sequence.

    Segments (which see which) --segments_in_use--> packed_attention, called by every layer

Registered with transformers under `PACKED`. It is computed in one of three ways:

    the kernel in C                     bf16 on a CPU
    torch's varlen_attn (Flash)         half precision on CUDA
    torch's scaled_dot_product_attention, segment by segment, otherwise

Padded batches attend by transformers' own function, under `PADDED`.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from buleyean_rl.kernels import attention
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.models.segments import (
    AttentionSegment,
    Segment,
    active_segments,
    attention_segments,
    cu_seqlens,
    exceeds_window,
)

PACKED = "buleyean_packed"
PADDED = "buleyean_padded"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a packed sequence, and from it to its context.

    Args:
        module: the attention layer, not used.
        query: Shape: (1, heads, tokens, head width).
        key: Shape: (1, key heads, tokens, head width).
        value: Shape as `key`.
        attention_mask: not used; the segments say it all.
        scaling: factor on the scores.
        dropout: on the attention weights.
        sliding_window: how many tokens back a token sees, itself included; None for all.
        kwargs: what else the model passes; none of it may be of `UNSUPPORTED`.

    Returns:
        Shape: (1, tokens, heads, head width), and None for the weights.

    Raises:
        NotImplementedError: the model does more to its scores than this function does.
    """
    if any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError("packed attention knows no soft-capping, sinks or position biases")
    past = key.shape[2] - query.shape[2]
    segments = active_segments() or (Segment(query.shape[2], ((0, past),) if past else ()),)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = attention_segments(segments, past)
    if len(query) == 1 and dropout == 0:
        if query.is_cuda and query.dtype in FLASH_TYPES:
            seqlens = cu_seqlens(segments, past, query.device)
            return _varlen_attention(query, key, value, seqlens, scale, sliding_window), None
        if attention.attention_available(query, query.shape[2], query.shape[3]) and not exceeds_window(
            parts, sliding_window
        ):
            seqlens = cu_seqlens(segments, past, query.device)
            output: Tensor = _PackedAttentionFunction.apply(query, key, value, seqlens, scale)
            return output, None
    return _attention_by_segment(query, key, value, parts, scale, dropout, sliding_window), None


def padded_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in fp32 where torch's products in bf16 are slow. Shapes as there."""
    dtype = query.dtype
    if bf16_is_emulated(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output.to(dtype), weights


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, seqlens: attention.CuSeqlens, scale: float, sliding_window: int | None
) -> Tensor:
    """All segments in one call of FlashAttention. Shapes as for `packed_attention`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if seqlens.keys is not None:
        k, v = k.index_select(0, seqlens.keys), v.index_select(0, seqlens.keys)
    left = -1 if sliding_window is None else sliding_window - 1
    output = varlen_attn(q, k, v, *seqlens[1:], scale=scale, window_size=(left, 0), **GROUPED)
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


class _PackedAttentionFunction(torch.autograd.Function):
    """All segments of a sequence in one call of `kernels.attention`. Shapes as for `packed_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seqlens: attention.CuSeqlens, scale: float
    ) -> Tensor:
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        value = value.contiguous()  # a view would keep the whole projection in memory
        output, lse = attention.attention(query[0], key[0], value[0], seqlens, scale)
        output = output.unsqueeze(0)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.seqlens, ctx.scale = seqlens, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        inputs = query[0], key[0], value[0], output[0], lse
        grad_query, grad_key, grad_value = (grad[0] for grad in grads)
        grad_output = grad_output[0].contiguous()
        attention.attention_backward(grad_output, *inputs, ctx.seqlens, ctx.scale, grad_query, grad_key, grad_value)
        return *grads, None, None


def _attention_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: list[AttentionSegment],
    scale: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """torch's own attention, segment by segment. Shapes as for `packed_attention`."""
    outputs = []
    for segment in segments:
        q, k, v = query[:, :, segment.queries], segment.gather(key), segment.gather(value)
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        if bf16_is_emulated(q):
            q, k, v = (x.float() for x in (q, k, v))
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=True)
        )
    output = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return output.to(query.dtype).transpose(1, 2).contiguous()


def _mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, the queries being the last of the keys; None for plain causal."""
    if queries == keys and (sliding_window is None or sliding_window >= keys):
        return None
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
AttentionInterface.register(PADDED, padded_attention)
AttentionMaskInterface.register(PADDED, sdpa_mask)
