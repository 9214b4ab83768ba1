"""What the figures of `evaluate` are called, in which order and unit they are shown, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from buleyean_rl.evaluation.drift import BUNDLED, OWN
from buleyean_rl.evaluation.measure import KEPT, NEUTRAL, Evaluation, text_figure
from buleyean_rl.evaluation.statistics import Interval

SHARE, NATS, KL, RANKING, TOKENS = (
    "share",
    "nats per token",
    "KL, nats per token",
    "rank correlation",
    "tokens",
)  # units
SUFFIX = re.compile(r"_t([\d.e+-]+)_(\d+)$")  # see `measure.sampling_suffix`


class Label(NamedTuple):
    """How a figure is shown.

    Args:
        text: what it is called, understood without the lines around it.
        unit: a share is shown in percent.
        better: the direction of improvement: 1, -1, or 0 for neither.
    """

    text: str
    unit: str
    better: int


def _text_labels(kind: str, title: str) -> dict[str, Label]:
    labels = {
        "kl": Label(f"{title}: KL from the reference", KL, -1),
        "entropy": Label(f"{title}: entropy", NATS, 0),
        "entropy_reference": Label(f"{title}: entropy of the reference", NATS, 0),
        "nll": Label(f"{title}: NLL", NATS, -1),
        "nll_reference": Label(f"{title}: NLL to the reference", NATS, 0),
    }
    return {text_figure(kind, part): label for part, label in labels.items()}


LABELS = {
    "loop_rate": Label("answers that loop", SHARE, -1),
    "ended_share": Label("answers that end by themselves", SHARE, 1),
    "distinct_4": Label("different 4-grams in the answers", SHARE, 1),
    "mean_length": Label("tokens in an answer", TOKENS, 0),
    "rejected_nll": Label("rejected answers: NLL", NATS, 1),
    "rejected_nll_reference": Label("rejected answers: NLL to the reference", NATS, 0),
    "regeneration_prefix": Label("rejected answers begun again", SHARE, -1),
    "regeneration_overlap": Label("4-grams taken from rejected answers", SHARE, -1),
    "accuracy": Label("pairs ranked right", SHARE, 1),
    "accuracy_reference": Label("pairs ranked right by the reference", SHARE, 0),
    "accuracy_vs_reference": Label("pairs ranked right by log pi/pi_ref", SHARE, 1),
    "accuracy_length_matched": Label("pairs of like length ranked right", SHARE, 1),
    "kendall_tau": Label("Kendall's tau with the counts", RANKING, 1),
    "ndcg": Label("NDCG of the counts", RANKING, 1),
    f"{KEPT}_share": Label("sound answers begun as by the base", SHARE, 1),
    f"{KEPT}_kl": Label("sound answers of the base: KL from the reference", KL, -1),
    **_text_labels(OWN, "own passages"),
    **_text_labels(BUNDLED, "bundled texts"),
    **_text_labels(NEUTRAL, "neutral texts"),
}


def label_of(name: str) -> Label:
    """The label of a figure; it says how the answers were drawn, where they were not drawn as the first ones."""
    suffix = SUFFIX.search(name)
    if suffix is None:
        return LABELS[name]
    temperature, tokens = suffix.groups()
    label = LABELS[SUFFIX.sub("", name)]
    return label._replace(text=f"{label.text}, at temperature {temperature}, {int(tokens):,} tokens")


def name_and_direction(name: str) -> str:
    """What a figure is called, and which way is better."""
    text, _, better = label_of(name)
    return text + {1: " (more is better)", -1: " (less is better)", 0: ""}[better]


def shown_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The figures that any of some evaluations has a value of, in the order of the labels.

    Several models are compared with each other, not with a reference.
    """
    names = dict.fromkeys(name for each in evaluations for name in (*each.figures, *each.distinct))
    given = [name for name in names if any(value_of(each, name) is not None for each in evaluations)]
    labels = [
        base for base in LABELS if len(evaluations) == 1 or not base.endswith("_reference") or LABELS[base].better
    ]
    return [name for base in labels for name in given if SUFFIX.sub("", name) == base]


def value_of(evaluation: Evaluation, name: str) -> float | None:
    """The value of a figure; None without."""
    if name in evaluation.distinct:
        return evaluation.distinct[name]
    figure = evaluation.figures.get(name)
    return None if figure is None else figure.value


def format_figure(value: float | None, interval: Interval | None, unit: str, *, is_difference: bool = False) -> str:
    """A value and its interval; "" for no value.

    Args:
        value: of the figure, or a difference of two.
        interval: of it; None for none.
        unit: of the figure; a difference of shares is in points.
        is_difference: show its sign.
    """
    if value is None:
        return ""
    factor = 100.0 if unit == SHARE else 1.0
    form = f"{{:{'+' * is_difference}.{1 if unit in (SHARE, TOKENS) else 3}f}}"
    percent = "%" if unit == SHARE and not is_difference else ""
    bounds = "" if interval is None else f" [{', '.join(form.format(factor * bound) for bound in interval)}]"
    return f"{form.format(factor * value)}{percent}{bounds}"
