"""Segments of a packed sequence: which tokens see which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels import attention

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


def active_segments() -> tuple[Segment, ...] | None:
    """Those of `segments_in_use`; None outside it."""
    return _segments


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


class AttentionSegment(NamedTuple):
    """A segment's queries, and the pieces of the row that hold the keys they see: the context, then their own."""

    queries: slice
    keys: list[slice]

    @property
    def seen(self) -> int:
        """How many keys its last query sees."""
        return sum(piece.stop - piece.start for piece in self.keys)


@lru_cache(maxsize=4)  # all layers ask for the same
def _stretches(segments: tuple[Segment, ...], before: int) -> list[AttentionSegment]:
    starts = accumulate((segment.length for segment in segments), initial=0)
    return [
        AttentionSegment(
            slice(start, start + segment.length),
            [*(slice(*piece) for piece in segment.context), slice(before + start, before + start + segment.length)],
        )
        for segment, start in zip(segments, starts, strict=False)
    ]


def _gather(row: Tensor, stretch: AttentionSegment) -> Tensor:
    """A stretch's keys or values. Shape: (..., row, width) to (..., seen, width)."""
    pieces = [row[..., piece, :] for piece in stretch.keys]
    return torch.cat(pieces, -2) if len(pieces) > 1 else pieces[0]


@lru_cache(maxsize=4)  # all layers ask for the same
def _lengths(segments: tuple[Segment, ...], before: int, device: torch.device) -> attention.CuSeqlens:
    stretches = _stretches(segments, before)
    places = torch.cat([torch.arange(piece.start, piece.stop) for stretch in stretches for piece in stretch.keys])
    as_it_is = places.equal(torch.arange(len(places)))
    queries, keys = [segment.length for segment in segments], [stretch.seen for stretch in stretches]
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (queries, keys))
    return attention.CuSeqlens(
        None if as_it_is else places.to(device), cu_seqlens_q, cu_seqlens_k, max(queries), max(keys)
    )
