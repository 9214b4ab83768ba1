"""Blocks of cached keys and values, which sequences that begin alike share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from buleyean_rl.kernels.decode import CACHE_BLOCK

CHUNK = 32  # blocks that are allocated at a time


class BlockCache:
    """Blocks by number, each in use by some sequences, or by none and kept for what it holds while there is room.

    What a block holds is known by its prefix: the number that the tokens up to its end were given.

    Args:
        block_numbers: numbers in bf16 of a block.
        capacity: blocks that are kept at most; more are made only where a sequence could not go on otherwise.
    """

    def __init__(self, block_numbers: int, capacity: int) -> None:
        self.block_numbers, self.capacity = block_numbers, capacity
        self._chunks: list[Tensor] = []
        self._users: list[int] = []  # of each block
        self._empty: list[int] = []
        self._unused: OrderedDict[int, None] = OrderedDict()  # that hold something, the longest unused first
        self._prefixes: dict[tuple[int, tuple[int, ...]], int] = {}  # by the one before and a block's tokens
        self._held: dict[int, tuple[tuple[int, tuple[int, ...]], int]] = {}  # by block: its key above, its prefix
        self._blocks: dict[int, int] = {}  # by prefix
        self._next_prefix = 1

    @property
    def free(self) -> int:
        """Blocks that can be had without making more than the capacity."""
        return len(self._empty) + len(self._unused) + max(0, self.capacity - len(self._users))

    def address(self, block: int) -> int:
        """Where a block begins."""
        return self._chunks[block // CHUNK][block % CHUNK].data_ptr()

    def share(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Blocks that hold the beginning of these tokens, now in use, and their prefix; a token at least is left."""
        blocks, prefix = [], 0
        for start in range(0, len(tokens) - CACHE_BLOCK, CACHE_BLOCK):
            known = self._prefixes.get((prefix, tuple(tokens[start : start + CACHE_BLOCK])))
            if known is None:
                break
            prefix = known
            block = self._blocks[prefix]
            self._users[block] += 1
            self._unused.pop(block, None)
            blocks.append(block)
        return blocks, prefix

    def allocate(self) -> int:
        """A block to write to."""
        if not self._empty and (not self._unused or len(self._users) < self.capacity):
            first = len(self._users)
            self._chunks.append(torch.empty(CHUNK, self.block_numbers, dtype=torch.bfloat16))
            self._users += [0] * CHUNK
            self._empty += reversed(range(first, first + CHUNK))
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def hold(self, block: int, prefix: int, tokens: Sequence[int]) -> int:
        """Note what a full block holds, for others to share; the prefix up to its end.

        Args:
            block: in use.
            prefix: of the block before it.
            tokens: of the block.
        """
        key = prefix, tuple(tokens)
        if key in self._prefixes:  # in another block, that was made at the same time
            return self._prefixes[key]
        number = self._prefixes[key] = self._next_prefix
        self._next_prefix += 1
        self._held[block], self._blocks[number] = (key, number), block
        return number

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence does not use its blocks any more; the last ones are reused first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._held:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def clear(self) -> None:
        """Forget what blocks hold: the model has changed."""
        for block in list(self._held):
            self._forget(block)
        self._empty += self._unused
        self._unused.clear()

    def _forget(self, block: int) -> None:
        key, prefix = self._held.pop(block)
        del self._prefixes[key], self._blocks[prefix]
