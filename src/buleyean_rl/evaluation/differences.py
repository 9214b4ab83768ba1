"""Two models on the same items: how their figures differ, and what can be said of it."""

from __future__ import annotations

from typing import NamedTuple

from buleyean_rl.evaluation.drift import BUNDLED, OWN
from buleyean_rl.evaluation.labels import label_of, shown_names, value_of
from buleyean_rl.evaluation.measure import KEPT, NEUTRAL, Evaluation, text_figure
from buleyean_rl.evaluation.statistics import Interval

KLS = [text_figure(kind, "kl") for kind in (OWN, BUNDLED, NEUTRAL)]
BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"


class Difference(NamedTuple):
    """A figure of one model less that of another.

    Args:
        value: None where either has none.
        interval: 95%; None for too few items.
    """

    value: float | None
    interval: Interval | None


def differences(first: Evaluation, other: Evaluation, seed: int = 0) -> dict[str, Difference]:
    """The first model's figures less the other's, of those that both have.

    Args:
        first: of the same items as `other`.
        other: the model compared with.
        seed: of the bootstrap.
    """
    of_the_base = () if first.base == other.base else (OWN, KEPT)  # other texts: their items are no pairs
    return {
        name: Difference(
            _subtract(value_of(first, name), value_of(other, name)),
            other.figures[name].difference(first.figures[name], seed),
        )
        for name in shown_names([first, other])
        if name in first.figures and name in other.figures and not name.startswith(of_the_base)
    }


def _subtract(value: float | None, subtracted: float | None) -> float | None:
    return None if value is None or subtracted is None else value - subtracted


def judge(name: str, difference: Difference) -> str:
    """Whether a difference is an improvement: only where its interval is on one side of 0; "" for a neutral figure."""
    better = label_of(name).better
    if not better:
        return ""
    if difference.interval is None or difference.interval.low <= 0 <= difference.interval.high:
        return CANNOT_TELL
    return BETTER if (difference.interval.low > 0) == (better > 0) else WORSE


def verdict(first: Evaluation, other: Evaluation, seed: int = 0) -> str:
    """In one line, in what the first model is better or worse than the other, and how far it is from its reference.

    Args:
        first: of the same items as `other`.
        other: the model compared with.
        seed: of the bootstrap.
    """
    judged: dict[str, list[str]] = {BETTER: [], WORSE: [], CANNOT_TELL: []}
    for name, difference in differences(first, other, seed).items():
        if word := judge(name, difference):
            judged[word].append(label_of(name).text)
    parts = [f"{word} in {', '.join(judged[word])}" for word in (BETTER, WORSE) if judged[word]]
    remaining = len(judged[CANNOT_TELL])
    if remaining:
        parts.append(f"cannot tell in {remaining} other{'s' * (remaining > 1)}" if parts else CANNOT_TELL)
    moved = [value for name in KLS if (value := value_of(first, name)) is not None]
    if moved:
        parts.append(f"its drift is KL {max(moved):.3f} nats per token")
    return f"{first.model} against {other.model}: {'; '.join(parts) or 'nothing to compare'}"
