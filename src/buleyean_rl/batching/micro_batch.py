"""Bin packing: records in as few micro-batches as fit in memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from buleyean_rl.models.views import plain_model

# Tokens of a forward pass in bf16, unless one record has more. The loss of a step is a sum over its records, so the
# result does not depend on it; memory grows with it, and matrix products are slow below some 500.
MICRO_BATCH_TOKENS = 1280
GPU_FACTOR = 25
T = TypeVar("T")


def micro_batch_tokens(model: Any) -> int:
    """Tokens that a micro-batch of a model may have: half as many in fp32, more on a GPU."""
    plain = plain_model(model)
    in_bf16 = MICRO_BATCH_TOKENS * (GPU_FACTOR if plain.device.type == "cuda" else 1)
    return int(in_bf16 * torch.bfloat16.itemsize // plain.dtype.itemsize)


def bin_pack(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Items in few bins within a limit, of sizes as even as their number allows.

    Best-fit decreasing says how many bins it takes. If filling the emptiest bin each time stays within the limit too,
    that is the result, as a fuller bin takes more memory.

    Args:
        items: to be packed.
        size: how many tokens an item has; one above the limit has a bin to itself.
        limit: tokens of a bin, see `micro_batch_tokens`.
    """
    bins: list[list[T]] = []
    free: list[int] = []
    longest_first = sorted(items, key=size, reverse=True)
    for item in longest_first:
        fitting = [index for index, tokens in enumerate(free) if size(item) <= tokens]
        if not fitting:
            bins.append([])
            free.append(limit)
        index = min(fitting, key=free.__getitem__, default=-1)
        bins[index].append(item)
        free[index] -= size(item)
    even: list[list[T]] = [[] for _ in bins]
    emptiest = [(0, index) for index in range(len(bins))]  # a heap
    for item in longest_first:
        tokens, index = heapq.heappop(emptiest)
        even[index].append(item)
        heapq.heappush(emptiest, (tokens + size(item), index))
    fullest = max(emptiest, default=(0, 0))[0]
    return even if fullest <= max([limit, *map(size, longest_first[:1])]) else bins
