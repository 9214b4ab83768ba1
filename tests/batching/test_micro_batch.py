"""Bin packing: everything once, in as few bins as it takes, and then evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.batching.micro_batch import bin_pack


@pytest.mark.parametrize(
    ("sizes", "limit", "bins"),
    [
        ([512] * 4, 1536, [[512, 512], [512, 512]]),  # not three and one
        ([900, 300, 200], 1000, [[900], [300, 200]]),
        ([60, 50, 40, 30, 20], 100, [[60, 40], [50, 30, 20]]),
        ([150, 60, 30], 100, [[150], [60, 30]]),  # one above the limit
        ([6, 5, 5, 4, 4, 4, 4], 16, [[6, 5, 5], [4, 4, 4, 4]]),  # the emptiest bin has no room for the last
        ([7, 6, 5, 5, 4, 4, 4, 3], 19, [[7, 4], [6, 4, 4], [5, 5, 3]]),
        ([], 10, []),
    ],
    ids=str,
)
def test_bins_are_few_and_balanced(sizes: list[int], limit: int, bins: list[list[int]]) -> None:
    assert sorted(bin_pack(sizes, int, limit)) == sorted(bins)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 50))
def test_bins_have_every_item_once_within_the_limit(sizes: list[int], limit: int) -> None:
    bins = bin_pack(list(enumerate(sizes)), lambda item: item[1], limit)
    assert sorted(item for members in bins for item in members) == list(enumerate(sizes))
    assert all(bins)
    assert all(sum(size for _, size in members) <= max([limit, *sizes]) for members in bins)
