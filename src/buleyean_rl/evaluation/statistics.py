"""Figures with their confidence intervals, and rankings against counts. Pure functions.

    items --Figure--> value, 95% interval, interval of the difference between two models

A *figure* is a ratio of sums over items, sum(a) / sum(b): nats over tokens, pairs ranked right over pairs. Its interval
is Wilson's for shares, else the percentile bootstrap's over items (Efron, 1979); two models are compared on the same
resamples.
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
MAX_RESAMPLED_ITEMS = 1 << 22  # in memory at a time
UNCOUNTED = (0.0, 0.0)  # an item of weight 0: all models have the same items


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
        numerator, denominator = self.items.sum(0)
        return float(numerator / denominator) if denominator else None

    def interval(self, seed: int = 0) -> Interval | None:
        """The 95% interval: Wilson's where each item is a yes or a no, else the bootstrap's; None for too few."""
        successes, trials = self.items.T
        if np.isin(trials, (0, 1)).all() and np.isin(successes, (0, 0.5, 1)).all():
            return wilson(float(successes.sum()), int(trials.sum()))
        return _percentile_interval(_resample([self], seed)[0]) if len(self.items) > 1 else None

    def difference(self, other: Figure, seed: int = 0) -> Interval | None:
        """The 95% interval of other - self, both over the same items, resampled together; None for too few.

        Raises:
            ValueError: they are not over the same number of items.
        """
        if len(self.items) != len(other.items):
            raise ValueError(f"{len(self.items)} items cannot be paired with {len(other.items)}")
        if len(self.items) < 2:
            return None
        own, others = _resample([self, other], seed)
        return _percentile_interval(others - own)


def _resample(figures: Sequence[Figure], seed: int) -> list[NDArray[np.float64]]:
    """The figures' values over the same resamples of their items. Shapes: (resamples,)."""
    generator = np.random.default_rng(seed)
    size = len(figures[0].items)
    chunks: list[list[NDArray[np.float64]]] = [[] for _ in figures]
    remaining = RESAMPLES
    while remaining:
        count = min(remaining, max(1, MAX_RESAMPLED_ITEMS // size))
        indices = generator.integers(size, size=(count, size))
        for values, figure in zip(chunks, figures, strict=True):
            sums = figure.items[indices].sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):  # a resample may sum to 0 / 0
                values.append(sums[:, 0] / sums[:, 1])
        remaining -= count
    return [np.concatenate(values) for values in chunks]


def _percentile_interval(values: NDArray[np.float64]) -> Interval | None:
    finite = values[np.isfinite(values)]
    return Interval(*map(float, np.quantile(finite, [0.025, 0.975]))) if len(finite) else None


def wilson(successes: float, total: int) -> Interval | None:
    """Wilson's 95% interval of a share (1927); None without trials.

    Args:
        successes: how many; a tie counts half.
        total: number of trials.
    """
    if not total:
        return None
    share, z2 = successes / total, Z95**2 / total
    center = (share + z2 / 2) / (1 + z2)
    margin = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    return Interval(max(0.0, center - margin), min(1.0, center + margin))


def preferred(better: float, worse: float) -> float:
    """1 if the better answer has the higher score, 0 if the lower, a half if they are equal."""
    return 0.5 if better == worse else float(better > worse)


def kendall_tau(scores: Sequence[float], truth: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings (1945).

    Concordant less discordant pairs, over the root of the product of the numbers of pairs that each ranking decides.

    Args:
        scores: 0 is the result if they are all equal.
        truth: of the same items; None is the result if these are all equal.
    """
    pairs = combinations(range(len(scores)), 2)
    signs = [(_sign(scores[i] - scores[j]), _sign(truth[i] - truth[j])) for i, j in pairs]
    scored, decided = (sum(map(abs, side)) for side in zip(*signs, strict=True)) if signs else (0, 0)
    if not decided:
        return None
    return sum(a * b for a, b in signs) / math.sqrt(scored * decided) if scored else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def ndcg(scores: Sequence[float], gains: Sequence[float]) -> float | None:
    """Normalised discounted cumulative gain of the ranking by scores (Järvelin and Kekäläinen, 2002).

    DCG = sum over ranks r of gain / log2(r + 1), over that of the best ranking. Tied items share the mean of their
    gains.

    Args:
        scores: the model's, of each item.
        gains: what each item is worth, 0 or more.

    Returns:
        Between 0 and 1; None where the gains are all equal.
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
