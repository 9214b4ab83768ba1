"""Bin packing: records in as few micro-batches as fit in memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from buleyean_rl.models.views import plain_model

# Of a forward pass in bf16, unless one record has more. The loss of a step is a sum over its records, so the result
# does not depend on it; memory grows with it, and matrix products are slow below some 500.
MICRO_BATCH_TOKENS = 1280
GPU_FACTOR = 25
T = TypeVar("T")


def micro_batch_tokens(model: Any) -> int:
    """Maximum tokens of a micro-batch: half as many in fp32, more on a GPU."""
    plain = plain_model(model)
    in_bf16 = MICRO_BATCH_TOKENS * (GPU_FACTOR if plain.device.type == "cuda" else 1)
    return int(in_bf16 * torch.bfloat16.itemsize // plain.dtype.itemsize)


def bin_pack(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Pack items into as few bins as best-fit decreasing needs, balanced where that stays within the limit.

    Balanced bins take less memory: each item goes to the emptiest.

    Args:
        items: to pack.
        size: an item's tokens; an item above the limit has a bin to itself.
        limit: maximum tokens of a bin, see `micro_batch_tokens`.
    """
    bins: list[list[T]] = []
    free_tokens: list[int] = []
    longest_first = sorted(items, key=size, reverse=True)
    for item in longest_first:
        fitting = [index for index, tokens in enumerate(free_tokens) if size(item) <= tokens]
        if not fitting:
            bins.append([])
            free_tokens.append(limit)
        index = min(fitting, key=free_tokens.__getitem__, default=-1)
        bins[index].append(item)
        free_tokens[index] -= size(item)
    balanced: list[list[T]] = [[] for _ in bins]
    loads = [(0, index) for index in range(len(bins))]  # a heap
    for item in longest_first:
        tokens, index = heapq.heappop(loads)
        balanced[index].append(item)
        heapq.heappush(loads, (tokens + size(item), index))
    fullest = max(loads, default=(0, 0))[0]
    return balanced if fullest <= max([limit, *map(size, longest_first[:1])]) else bins
