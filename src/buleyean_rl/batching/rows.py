"""Bin packing: records in as few micro-batches as fit in memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from buleyean_rl.models.views import plain_model

# Tokens a forward pass takes at a time, unless one record has more. The loss of a step is a sum over its records, so
# it does not matter to the result; memory grows with it, and below some 500 the matrix products slow down. In bf16
# a row holds two records of 512, and a short one.
MICRO_BATCH_TOKENS = 1280
GPU_FACTOR = 25
T = TypeVar("T")


def micro_batch_tokens(model: Any) -> int:
    """Tokens a row of a model may have: half as many where it is in fp32, more on a GPU."""
    plain = plain_model(model)
    in_bf16 = MICRO_BATCH_TOKENS * (GPU_FACTOR if plain.device.type == "cuda" else 1)
    return int(in_bf16 * torch.bfloat16.itemsize // plain.dtype.itemsize)


def bin_pack(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Items in few rows, each short enough for memory, and no longer than it has to be.

    How many rows it takes is found with the longest items first, each where it leaves the least room. If each can be
    put in the shortest row as well, that is what they are, as a row that is longer takes more memory.

    Args:
        items: what is to be laid out.
        size: how many tokens an item has; one with more than a row has a row to itself.
        limit: tokens of a row, see `micro_batch_tokens`.
    """
    rows: list[list[T]] = []
    rooms: list[int] = []
    longest_first = sorted(items, key=size, reverse=True)
    for item in longest_first:
        fitting = [row for row, room in enumerate(rooms) if size(item) <= room]
        if not fitting:
            rows.append([])
            rooms.append(limit)
        row = min(fitting, key=rooms.__getitem__, default=-1)
        rows[row].append(item)
        rooms[row] -= size(item)
    even: list[list[T]] = [[] for _ in rows]
    shortest = [(0, row) for row in range(len(rows))]  # a heap
    for item in longest_first:
        tokens, row = heapq.heappop(shortest)
        even[row].append(item)
        heapq.heappush(shortest, (tokens + size(item), row))
    longest = max(shortest, default=(0, 0))[0]
    return even if longest <= max([limit, *map(size, longest_first[:1])]) else rows
