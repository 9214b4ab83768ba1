"""Numbers from numbers: rankings against counts, and how sure a figure is. Pure functions.

A *figure* is a ratio of sums over items, sum(a) / sum(b): nats over tokens, pairs ranked right over pairs. What
happens to it when other items had been drawn is found by drawing the items again (the bootstrap); two models
are compared on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Z95 = 1.959963984540054  # of the normal distribution, two-sided 95%
ROWS_AT_ONCE = 1 << 22  # of resampled items in memory


class Interval(NamedTuple):
    """A range that holds the value in 95 of 100 repetitions."""

    low: float
    high: float


class Figure:
    """A ratio of sums over items.

    Args:
        items: (a, b) of each item. Shape: (items, 2).
    """

    def __init__(self, items: Sequence[tuple[float, float]]) -> None:
        self.items: NDArray[np.float64] = np.asarray(items, dtype=np.float64).reshape(-1, 2)

    @property
    def value(self) -> float | None:
        """sum(a) / sum(b), or None over nothing."""
        above, below = self.items.sum(0)
        return float(above / below) if below else None

    def interval(self, seed: int = 0) -> Interval | None:
        """95%: Wilson's where each item says yes or no, else the bootstrap over items; None for too few."""
        yes, asked = self.items.T
        if np.isin(asked, (0, 1)).all() and np.isin(yes, (0, 0.5, 1)).all():
            return wilson(float(yes.sum()), int(asked.sum()))
        return _percentiles(_resampled([self], seed)[0]) if len(self.items) > 1 else None

    def difference(self, other: Figure, seed: int = 0) -> Interval | None:
        """The same of other - self, both over the same items, drawn together.

        Raises:
            ValueError: they are not over the same number of items.
        """
        if len(self.items) != len(other.items):
            raise ValueError(f"{len(self.items)} items cannot be paired with {len(other.items)}")
        if len(self.items) < 2:
            return None
        own, others = _resampled([self, other], seed)
        return _percentiles(others - own)


def _resampled(figures: Sequence[Figure], seed: int) -> list[NDArray[np.float64]]:
    """The figures' values over the same resamples of their items. Shapes: (resamples,)."""
    generator = np.random.default_rng(seed)
    size = len(figures[0].items)
    drawn: list[list[NDArray[np.float64]]] = [[] for _ in figures]
    left = RESAMPLES
    while left:
        rows = min(left, max(1, ROWS_AT_ONCE // size))
        chosen = generator.integers(size, size=(rows, size))
        for values, figure in zip(drawn, figures, strict=True):
            sums = figure.items[chosen].sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):  # a draw of items that all count for nothing
                values.append(sums[:, 0] / sums[:, 1])
        left -= rows
    return [np.concatenate(values) for values in drawn]


def _percentiles(values: NDArray[np.float64]) -> Interval | None:
    finite = values[np.isfinite(values)]
    return Interval(*map(float, np.quantile(finite, [0.025, 0.975]))) if len(finite) else None


def wilson(right: float, total: int) -> Interval | None:
    """Wilson's 95% interval of a share (1927); None of nothing.

    Args:
        right: how many, halves included.
        total: of how many.
    """
    if not total:
        return None
    share, z2 = right / total, Z95**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    reach = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    return Interval(max(0.0, middle - reach), min(1.0, middle + reach))


def preferred(better: float, worse: float) -> float:
    """1 if the better answer has the higher score, 0 if the lower, a half if they are equal."""
    return 0.5 if better == worse else float(better > worse)


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings (1945).

    Pairs in the same order less pairs in opposite order, over the root of the product of the numbers of pairs
    that each ranking decides.

    Args:
        one: scores; 0 is the result if they are all equal.
        other: scores of the same items; None is the result if these are all equal, for then nothing is asked.
    """
    signs = [(_sign(one[i] - one[j]), _sign(other[i] - other[j])) for i, j in combinations(range(len(one)), 2)]
    ones, others = (sum(map(abs, side)) for side in zip(*signs, strict=True)) if signs else (0, 0)
    if not others:
        return None
    return sum(a * b for a, b in signs) / math.sqrt(ones * others) if ones else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def ndcg(scores: Sequence[float], gains: Sequence[float]) -> float | None:
    """Normalised discounted cumulative gain of the ranking by scores (Järvelin and Kekäläinen, 2002).

    DCG = sum over ranks r of gain / log2(r + 1), over that of the best ranking. Items of equal score have the
    mean of their gains, so that their order does not matter.

    Args:
        scores: the model's, of each item.
        gains: what each item is worth, 0 or more.

    Returns:
        Between 0 and 1; None where the gains are all equal, for then nothing is asked.
    """
    if len(set(gains)) < 2:
        return None
    by_score: dict[float, list[float]] = {}
    for score, gain in zip(scores, gains, strict=True):
        by_score.setdefault(score, []).append(gain)
    ranked = [sum(tied) / len(tied) for _, tied in sorted(by_score.items(), reverse=True) for _ in tied]
    return _dcg(ranked) / _dcg(sorted(gains, reverse=True))


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
