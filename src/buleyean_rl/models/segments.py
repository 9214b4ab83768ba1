"""Segments of a packed sequence: which tokens see which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.attention import CuSeqlens

# Sequences are padded to a multiple of it: oneDNN compiles a kernel for every length that a product has, which takes as
# long as the product, and a megabyte.
ROUND = 32


@dataclass(frozen=True)
class Segment:
    """Tokens of a packed sequence that follow each other on one path.

    Args:
        length: how many tokens; segments tile the sequence in order.
        context: ranges [start, end) of earlier tokens that every token of this segment sees.
    """

    length: int
    context: tuple[tuple[int, int], ...] = ()


_active_segments: tuple[Segment, ...] | None = None


def active_segments() -> tuple[Segment, ...] | None:
    """Those of `segments_in_use`; None outside it."""
    return _active_segments


@contextmanager
def segments_in_use(segments: tuple[Segment, ...] | None) -> Iterator[None]:
    """Let attention within follow these segments; None for an ordinary causal sequence.

    transformers hands an attention function only what the model's own code passes down, which differs from model to
    model, so the segments are state of the process. Not of the thread: a GPU's backward pass, which computes a
    checkpointed layer again, runs in a thread of its own.
    """
    global _active_segments
    before, _active_segments = _active_segments, segments
    try:
        yield
    finally:
        _active_segments = before


class AttentionSegment(NamedTuple):
    """A segment's queries, and the slices of the sequence with the keys they see: the context, then their own."""

    queries: slice
    keys: list[slice]

    @property
    def seqlen_k(self) -> int:
        """How many keys its last query sees."""
        return sum(keys.stop - keys.start for keys in self.keys)

    def gather(self, x: Tensor) -> Tensor:
        """Its keys or values. Shape: (..., tokens, width) to (..., `seqlen_k`, width)."""
        parts = [x[..., keys, :] for keys in self.keys]
        return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


@lru_cache(maxsize=4)  # all layers ask for the same
def attention_segments(segments: tuple[Segment, ...], past: int) -> list[AttentionSegment]:
    """The queries and keys of segments.

    Args:
        segments: of a packed sequence.
        past: how many keys are of earlier calls, in generation.
    """
    starts = accumulate((segment.length for segment in segments), initial=0)
    return [
        AttentionSegment(
            slice(start, start + segment.length),
            [*(slice(*keys) for keys in segment.context), slice(past + start, past + start + segment.length)],
        )
        for segment, start in zip(segments, starts, strict=False)
    ]


@lru_cache(maxsize=4)  # all layers ask for the same
def cu_seqlens(segments: tuple[Segment, ...], past: int, device: torch.device) -> CuSeqlens:
    """Segments as kernels for sequences of many lengths take them; arguments as for `attention_segments`."""
    parts = attention_segments(segments, past)
    keys = torch.cat([torch.arange(piece.start, piece.stop) for part in parts for piece in part.keys])
    in_order = keys.equal(torch.arange(len(keys)))
    lengths_q, lengths_k = [segment.length for segment in segments], [part.seqlen_k for part in parts]
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (lengths_q, lengths_k)
    )
    return CuSeqlens(None if in_order else keys.to(device), cu_seqlens_q, cu_seqlens_k, max(lengths_q), max(lengths_k))


def exceeds_window(segments: Sequence[AttentionSegment], sliding_window: int | None) -> bool:
    """Whether some token does not see everything before it."""
    return sliding_window is not None and any(segment.seqlen_k > sliding_window for segment in segments)
