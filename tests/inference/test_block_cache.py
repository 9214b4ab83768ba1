"""Blocks are shared by what they hold, kept while there is room, and never written to by two."""

from __future__ import annotations

import pytest

from buleyean_rl.inference.block_cache import BlockCache
from buleyean_rl.kernels.decode import CACHE_BLOCK

TOKENS = list(range(4 * CACHE_BLOCK))


def fill(cache: BlockCache, tokens: list[int]) -> list[int]:
    """Blocks of a sequence whose tokens are computed, as far as they are full."""
    blocks, prefix = cache.share(tokens)
    for start in range(len(blocks) * CACHE_BLOCK, len(tokens) - CACHE_BLOCK + 1, CACHE_BLOCK):
        blocks.append(cache.allocate())
        prefix = cache.hold(blocks[-1], prefix, tokens[start : start + CACHE_BLOCK])
    return blocks


def test_sequences_that_begin_alike_share_their_blocks() -> None:
    cache = BlockCache(8, 32)
    first = fill(cache, TOKENS)
    other = [*TOKENS[: 2 * CACHE_BLOCK + 3], *([999] * CACHE_BLOCK)]
    blocks, _ = cache.share(other)
    assert blocks == first[:2]
    assert cache.share([1, *TOKENS]) == ([], 0)
    assert len({cache.address(block) for block in first}) == len(first)


def test_a_token_is_left_to_compute() -> None:
    cache = BlockCache(8, 32)
    first = fill(cache, TOKENS)
    assert cache.share(TOKENS)[0] == first[:3]
    assert cache.share(TOKENS[:CACHE_BLOCK]) == ([], 0)
    assert cache.share(TOKENS[: CACHE_BLOCK + 1])[0] == first[:1]


def test_released_blocks_are_found_again_until_there_is_no_room() -> None:
    cache = BlockCache(8, 32)
    first = fill(cache, TOKENS)
    cache.release(first)
    assert cache.free == 32
    assert cache.share([*TOKENS, 0])[0] == first
    assert cache.free == 28
    cache.release(first)
    taken = [cache.allocate() for _ in range(30)]  # the last ones of the sequence go first
    assert len(set(taken)) == 30
    assert cache.share([*TOKENS, 0])[0] == first[:2]
    assert not set(taken) & set(first[:2])


def test_the_same_text_computed_twice_is_kept_once() -> None:
    cache = BlockCache(8, 32)
    one, other = cache.allocate(), cache.allocate()
    assert cache.hold(one, 0, TOKENS[:CACHE_BLOCK]) == cache.hold(other, 0, TOKENS[:CACHE_BLOCK])
    cache.release([one, other])
    assert cache.share(TOKENS[: CACHE_BLOCK + 1])[0] == [one]


def test_a_block_is_free_only_when_nobody_uses_it() -> None:
    cache = BlockCache(8, 32)
    first = fill(cache, TOKENS)
    cache.share(TOKENS)
    cache.release(first)
    assert cache.free == 29


def test_nothing_is_shared_after_the_model_changed() -> None:
    cache = BlockCache(8, 32)
    in_use, unused = fill(cache, TOKENS), fill(cache, [9, *TOKENS])
    cache.release(unused)
    cache.clear()
    assert cache.share(TOKENS) == ([], 0)
    cache.release(in_use)
    assert cache.free == 32
    assert sorted(cache.allocate() for _ in range(32)) == list(range(32))


@pytest.mark.parametrize("capacity", [1, 40])
def test_more_blocks_than_the_capacity_where_one_must_go_on(capacity: int) -> None:
    cache = BlockCache(8, capacity)
    assert len({cache.allocate() for _ in range(100)}) == 100
    assert cache.free <= 28  # of the last chunk
