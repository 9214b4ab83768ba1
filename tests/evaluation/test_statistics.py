"""Rank correlations, gains and intervals, by hand and against their definitions."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.evaluation.statistics import Figure, kendall_tau, ndcg, preferred, wilson

ranks = st.lists(st.integers(0, 4), min_size=2, max_size=7)


def test_kendall_by_hand() -> None:
    assert kendall_tau([3, 2, 1], [3, 2, 1]) == 1
    assert kendall_tau([3, 2, 1], [1, 2, 3]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(4 / math.sqrt(6 * 4))
    assert kendall_tau([1, 1], [1, 2]) == 0
    assert kendall_tau([1, 2], [5, 5]) is None
    assert kendall_tau([1], [5]) is None


@given(st.data(), ranks)
def test_kendall_is_the_textbook_one(data: st.DataObject, one: list[int]) -> None:
    """tau-b = (P - Q) / sqrt((P + Q + X) (P + Q + Y)), X and Y the pairs tied in one ranking only."""
    other = data.draw(st.lists(st.integers(0, 4), min_size=len(one), max_size=len(one)))
    concordant = discordant = only_one = only_other = 0
    for (a, b), (c, d) in combinations(list(zip(one, other, strict=True)), 2):
        if a != c and b != d:
            concordant += (a < c) == (b < d)
            discordant += (a < c) != (b < d)
        else:
            only_one += a != c
            only_other += b != d
    decided = concordant + discordant
    below = math.sqrt((decided + only_one) * (decided + only_other))
    got = kendall_tau(one, other)
    if decided + only_other == 0:
        assert got is None
    else:
        assert got == pytest.approx((concordant - discordant) / below if below else 0.0)
        assert kendall_tau([-value for value in one], other) == pytest.approx(-(got or 0.0))


def test_ndcg_by_hand() -> None:
    assert ndcg([3, 2, 1], [1, 0.5, 0]) == 1
    ideal = 1 + 0.5 / math.log2(3)
    assert ndcg([1, 2, 3], [1, 0.5, 0]) == pytest.approx((0.5 / math.log2(3) + 1 / 2) / ideal)
    assert ndcg([7, 7], [1, 0]) == pytest.approx(0.5 + 0.5 / math.log2(3))
    assert ndcg([1, 2], [1, 1]) is None


@given(ranks.filter(lambda gains: len(set(gains)) > 1))
def test_the_best_order_has_the_highest_ndcg(gains: list[int]) -> None:
    values = [ndcg(order, gains) or 0.0 for order in list(permutations(range(len(gains))))[:200]]
    assert max(values) <= 1 + 1e-12
    assert min(values) > 0
    assert ndcg(gains, gains) == pytest.approx(1)


def test_preferred_is_even_handed() -> None:
    assert [preferred(2, 1), preferred(1, 2), preferred(1, 1)] == [1, 0, 0.5]


def test_wilson_by_hand() -> None:
    """The worked example of 8 in 10, and the ends."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((1 - 0.2775328, 1), abs=1e-6)
    assert wilson(0, 0) is None


def test_a_figure_is_a_ratio_of_sums() -> None:
    assert Figure([(2.0, 4.0), (1.0, 2.0), (0.0, 0.0)]).value == 0.5
    assert Figure([]).value is None
    assert Figure([(0.0, 0.0)]).interval() is None
    assert Figure([(3.0, 5.0)]).interval() is None
    assert Figure([(1.0, 1.0)] * 8 + [(0.0, 1.0)] * 2).interval() == wilson(8, 10)


def test_the_bootstrap_repeats_and_covers() -> None:
    generator = np.random.default_rng(1)
    figure = Figure([(float(value), 1.0) for value in generator.normal(3.0, 2.0, 400)])
    interval = figure.interval(seed=5)
    assert interval == figure.interval(seed=5) != figure.interval(seed=6)
    assert interval is not None
    # the mean's standard error is about 2 / sqrt(400) = 0.1, and 1.96 of them lie to each side
    mean = figure.items[:, 0].mean()
    error = figure.items[:, 0].std() / 20
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.02)


def test_a_paired_difference_is_narrower_than_either() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(3.0, 2.0, 200)
    one = Figure([(float(value), 1.0) for value in base])
    other = Figure([(float(value) + 0.5, 1.0) for value in base])
    assert one.difference(other) == pytest.approx((0.5, 0.5))
    assert one.difference(one) == pytest.approx((0, 0))
    with pytest.raises(ValueError, match="cannot be paired"):
        one.difference(Figure([(1.0, 1.0)]))
