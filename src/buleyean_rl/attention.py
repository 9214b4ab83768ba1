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
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from buleyean_rl import kernels
from buleyean_rl.arithmetic import is_slow

PACKED = "buleyean_packed"
PADDED = "buleyean_padded"
UNKNOWN = ("softcap", "s_aux", "position_bias")
BLOCK = 256  # queries; measured against 64, 128 and 512
FLASH_TYPES = (torch.bfloat16, torch.float16)
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

# Lengths are filled up to a multiple of it: a CPU's matrix kernels are made anew for every length that a product has,
# which takes as long as the product and a megabyte.
ROUND = 32


@dataclass(frozen=True)
class Segment:
    """A stretch of a packed row that attends as one: its tokens follow each other on one path.

    Args:
        length: how many tokens; segments tile the row in order.
        context: earlier stretches of the row, [start, end), that every token of this one can see.
    """

    length: int
    context: tuple[tuple[int, int], ...] = ()


_segments: tuple[Segment, ...] | None = None


@contextmanager
def segments_in_use(segments: tuple[Segment, ...] | None) -> Iterator[None]:
    """Let attention within follow these segments; None for an ordinary causal row.

    transformers hands an attention function only what the model's own code passes down, which differs
    from model to model; the segments travel beside it. They are the process's, not the thread's: a GPU's
    backward pass, which may compute a checkpointed layer again, runs in a thread of its own.
    """
    global _segments
    before, _segments = _segments, segments
    try:
        yield
    finally:
        _segments = before


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
    segments = _segments or (Segment(query.shape[2], ((0, before),) if before else ()),)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and dropout == 0 and query.dtype in FLASH_TYPES and len(query) == 1:
        return _attend_at_once(query, key, value, _lengths(segments, before, query.device), scale, sliding_window), None
    stretches = _stretches(segments, before)
    if query.device.type == "cpu" and dropout == 0 and not _windowed(stretches, sliding_window):
        if len(query) == 1 and kernels.attends(query, query.shape[2], query.shape[3]):
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
    if is_slow(query):
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
            y, lse = kernels.attention(query[0], key[0], value[0], stretches, self.scale)
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
            kernels.attention_backward(gradient[0], query, key, value, output[0], lse, stretches, self.scale, *grads)
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

    def in_tiles(self, like: Tensor, tokens: int, width: int, before: int = 0) -> kernels.Stretches | None:
        """What `kernels.attention` takes, where it is to compute.

        Args:
            like: numbers of the type and on the device that compute.
            tokens: of the row.
            width: of a head.
            before: keys of earlier calls, in generation.
        """
        if not kernels.attends(like, tokens, width) or self._is_windowed(before):
            return None
        return _lengths(self.segments, before, like.device)

    def _by_graph(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with segments_in_use(self.segments):
            return packed_attention(None, query, key, value, None, self.scale, sliding_window=self.sliding_window)[0]

    def _is_windowed(self, before: int) -> bool:
        return _windowed(_stretches(self.segments, before), self.sliding_window)


def row_in_use(tokens: int, scale: float, sliding_window: int | None) -> Row:
    """How a row of so many tokens attends within `segments_in_use`; otherwise it is an ordinary causal row."""
    return Row(_segments or (Segment(tokens),), scale, sliding_window)


def _before(query: Tensor, key: Tensor) -> int:
    """How many keys are of earlier calls, in generation."""
    return key.shape[2] - query.shape[2]


def _windowed(stretches: list[_Stretch], sliding_window: int | None) -> bool:
    """Whether some token does not see all that is before it."""
    return sliding_window is not None and any(stretch.seen > sliding_window for stretch in stretches)


class _Stretch(NamedTuple):
    """A segment's queries, and the pieces of the row that hold the keys they see: the context, then their own."""

    queries: slice
    keys: list[slice]

    @property
    def seen(self) -> int:
        return sum(piece.stop - piece.start for piece in self.keys)


@lru_cache(maxsize=4)  # all layers ask for the same
def _stretches(segments: tuple[Segment, ...], before: int) -> list[_Stretch]:
    starts = accumulate((segment.length for segment in segments), initial=0)
    return [
        _Stretch(
            slice(start, start + segment.length),
            [*(slice(*piece) for piece in segment.context), slice(before + start, before + start + segment.length)],
        )
        for segment, start in zip(segments, starts, strict=False)
    ]


def _gather(row: Tensor, stretch: _Stretch) -> Tensor:
    """A stretch's keys or values. Shape: (..., row, width) to (..., seen, width)."""
    pieces = [row[..., piece, :] for piece in stretch.keys]
    return torch.cat(pieces, -2) if len(pieces) > 1 else pieces[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: list[_Stretch],
    scale: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """torch's own attention, stretch by stretch. Shapes as for `packed_attention`."""
    outputs = []
    for stretch in stretches:
        q, k, v = query[:, :, stretch.queries], _gather(key, stretch), _gather(value, stretch)
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        if is_slow(q):
            q, k, v = (x.float() for x in (q, k, v))
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=True)
        )
    output = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return output.to(query.dtype).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)  # all layers ask for the same
def _lengths(segments: tuple[Segment, ...], before: int, device: torch.device) -> kernels.Stretches:
    stretches = _stretches(segments, before)
    places = torch.cat([torch.arange(piece.start, piece.stop) for stretch in stretches for piece in stretch.keys])
    as_it_is = places.equal(torch.arange(len(places)))
    queries, keys = [segment.length for segment in segments], [stretch.seen for stretch in stretches]
    until_query, until_key = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (queries, keys))
    return kernels.Stretches(None if as_it_is else places.to(device), until_query, until_key, max(queries), max(keys))


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, lengths: kernels.Stretches, scale: float, sliding_window: int | None
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


class _BlockwiseBackward(torch.autograd.Function):
    """torch's own attention with another backward pass, which takes half the time of torch's on a CPU.

    It goes by blocks of queries against only the keys they see, whose weights it computes again. The heads that share
    a key head are stacked, so that each product is one batched matmul.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stretches: list[_Stretch], scale: float) -> Tensor:
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
    stretches: list[_Stretch],
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
    if kernels.available(scores):
        kernels.causal_softmax(of_queries)
        return scores
    queries = query.shape[1]
    of_queries[..., -queries:].masked_fill_(_future(queries), float("-inf"))
    return scores.softmax(-1)


def _softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient in the scores from that in the weights, which it may overwrite. Shape: both alike."""
    if kernels.available(gradient):
        kernels.softmax_backward(gradient, weights)
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


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
AttentionInterface.register(PADDED, padded_attention)
AttentionMaskInterface.register(PADDED, sdpa_mask)
