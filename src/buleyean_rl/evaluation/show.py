"""What `buleyean evaluate` shows of its measurements.

evaluations of models, the first against the others --> one JSON object, one table, one plot
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from buleyean_rl.evaluation.drift import BUNDLED, OWN
from buleyean_rl.evaluation.measure import KEPT, NEUTRAL, Evaluation, text_figure
from buleyean_rl.evaluation.statistics import Interval
from buleyean_rl.system.files import read_json_object
from buleyean_rl.system.outputs import open_output


@dataclass(frozen=True)
class Label:
    """How a figure is shown.

    Args:
        text: what it is called.
        is_share: it is shown in percent.
        better: the direction of improvement: 1, -1, or 0 for neither.
    """

    text: str
    is_share: bool
    better: int


def _text_labels(kind: str, title: str) -> dict[str, Label]:
    """Labels of the figures of a kind of text, in nats per token."""
    labels = {
        "kl": Label(f"{title}: KL(reference || model)", False, -1),
        "entropy": Label("  entropy", False, 0),
        "entropy_reference": Label("  entropy of the reference", False, 0),
        "nll": Label("  NLL", False, -1),
        "nll_reference": Label("  NLL to the reference", False, 0),
    }
    return {text_figure(kind, part): label for part, label in labels.items()}


LABELS = {
    "accuracy": Label("pairs ranked right", True, 1),
    "accuracy_reference": Label("  by the reference", True, 0),
    "accuracy_vs_reference": Label("  by log pi/pi_ref", True, 1),
    "accuracy_length_matched": Label("  of like length", True, 1),
    "kendall_tau": Label("Kendall's tau with the counts", False, 1),
    "ndcg": Label("NDCG of the counts", False, 1),
    "rejected_nll": Label("rejected answers, nats per token", False, 1),
    "rejected_nll_reference": Label("  to the reference", False, 0),
    "regeneration_prefix": Label("rejected answers begun again", True, -1),
    "regeneration_overlap": Label("4-grams from rejected answers", True, -1),
    **_text_labels(OWN, "own passages"),
    **_text_labels(BUNDLED, "bundled texts"),
    **_text_labels(NEUTRAL, "plain text"),
    f"{KEPT}_kl": Label("KL on answers to keep", False, -1),
    f"{KEPT}_share": Label("  that begin as the base's", True, 1),
    "loop_rate": Label("answers that loop", True, -1),
    "distinct_4": Label("different 4-grams", True, 1),
    "mean_length": Label("tokens in an answer", False, 0),
    "ended_share": Label("answers that end by themselves", True, 1),
}
SUFFIX = re.compile(r"_t([\d.e+-]+)_(\d+)$")  # see `measure.sampling_suffix`
MARK = "buleyean-rl evaluate"  # in a picture's metadata
PICTURES = (".png", ".svg", ".pdf")
FIRST_KEYS = (  # of the JSON object, in this order; null without a value
    "accuracy",
    "accuracy_ci",
    "accuracy_vs_reference",
    "accuracy_length_matched",
    "kendall_tau",
    "ndcg",
    "rejected_nll",
    "neutral_nll",
    "neutral_kl",
    "loop_rate",
    "distinct_4",
    "mean_length",
    "ended_share",
    "entropy",
)


def as_json(evaluations: Sequence[Evaluation], seed: int = 0) -> dict[str, Any]:
    """The first evaluation as one object, the others in its `compare`.

    Args:
        evaluations: at least one, over the same items.
        seed: of the bootstrap.
    """
    first, *others = evaluations
    compare = []
    for other in others:
        differences = {
            name: {"difference": _difference(first, other, name), "interval": _as_list(interval)}
            for name, interval in _difference_intervals(first, other, seed).items()
        }
        compare.append(_evaluation_json(other, seed) | {"differences": differences})
    return _evaluation_json(first, seed) | ({"compare": compare} if others else {})


def _evaluation_json(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    figures = evaluation.figures
    values: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
    intervals = {name: _as_list(figure.interval(seed)) for name, figure in figures.items()}
    values |= {"accuracy_ci": intervals.get("accuracy"), **evaluation.distinct}
    return {
        "model": evaluation.model,
        "reference": evaluation.reference,
        "pairs": _pairs(evaluation, "accuracy"),
        **{name: values.pop(name, None) for name in FIRST_KEYS},
        **values,
        "pairs_length_matched": _pairs(evaluation, "accuracy_length_matched"),
        "intervals": intervals,
        "counts": evaluation.counts,
        "notes": evaluation.notes,
    }


def _pairs(evaluation: Evaluation, name: str) -> int | None:
    """The number of pairs that an accuracy is over."""
    figure = evaluation.figures.get(name)
    return None if figure is None else int(figure.items[:, 1].sum())


def _difference_intervals(first: Evaluation, other: Evaluation, seed: int) -> dict[str, Interval | None]:
    """Intervals of first - other, for the figures that both have."""
    of_the_base = () if first.base == other.base else (OWN, KEPT)  # other texts: their items are no pairs
    shared = [
        name
        for name in _names([first, other])
        if name in first.figures and name in other.figures and not name.startswith(of_the_base)
    ]
    return {name: other.figures[name].difference(first.figures[name], seed) for name in shared}


def _difference(first: Evaluation, other: Evaluation, name: str) -> float | None:
    value, subtracted = first.figures[name].value, other.figures[name].value
    return None if value is None or subtracted is None else value - subtracted


def _as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def table(evaluations: Sequence[Evaluation], seed: int = 0) -> Table:
    """The figures with 95% intervals, one in each row, and the first model's differences to the others.

    Args:
        evaluations: at least one, over the same items.
        seed: of the bootstrap.
    """
    first, *others = evaluations
    shown = Table(title="measured; in brackets, where 95 of 100 repetitions fall")
    shown.add_column("", no_wrap=True)
    for evaluation in evaluations:
        shown.add_column(escape(evaluation.model), justify="right", overflow="fold")
    for number in range(len(others)):
        shown.add_column("difference" if len(others) == 1 else f"less the {number + 2}.", justify="right")
    differences = [_difference_intervals(first, other, seed) for other in others]
    for name in _names(evaluations):
        label = _label(name)
        cells = [_cell(evaluation, name, seed) for evaluation in evaluations]
        if not any(cells):
            continue
        for other, intervals in zip(others, differences, strict=True):
            has_both = name in intervals
            cells.append(
                _text(_difference(first, other, name), intervals[name], label.is_share, sign=True) if has_both else ""
            )
        shown.add_row(label.text, *cells)
    return shown


def lines(evaluation: Evaluation) -> list[str]:
    """What a reader of the table should know: counts that are not zero, and notes."""
    labels = {
        "answers_cut": "answers cut at the length limit",
        "answers_without_room": "answers without room: left out",
        "empty_answers": "blank answers left out",
        "bad_rows": "bad rows left out",
        "prompts_unanswered": "prompts without an answer: left out",
    }
    counts = [f"{label}: {evaluation.counts[name]:,}" for name, label in labels.items() if evaluation.counts.get(name)]
    pairs, matched = _pairs(evaluation, "accuracy"), _pairs(evaluation, "accuracy_length_matched")
    return [
        *([f"pairs: {pairs:,}, of like length {matched:,}"] if pairs is not None else []),
        *counts,
        *evaluation.notes,
    ]


def _cell(evaluation: Evaluation, name: str, seed: int) -> str:
    figure = evaluation.figures.get(name)
    interval = None if figure is None else figure.interval(seed)
    return _text(_value(evaluation, name), interval, _label(name).is_share)


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The figures of some evaluations in the order of the labels, of each the suffixes in their order."""
    given = list(dict.fromkeys(name for each in evaluations for name in (*each.figures, *each.distinct)))
    return [name for base in LABELS for name in given if SUFFIX.sub("", name) == base]


def _label(name: str) -> Label:
    """The label of a figure, or below it of how else its answers were drawn."""
    suffix = SUFFIX.search(name)
    if suffix is None:
        return LABELS[name]
    temperature, tokens = suffix.groups()
    return replace(LABELS[SUFFIX.sub("", name)], text=f"  at temperature {temperature}, {int(tokens):,} tokens")


def _title(name: str) -> str:
    """A figure's title where it stands alone."""
    label, base = _label(name).text.strip(), SUFFIX.sub("", name)
    if base != name:
        return f"{LABELS[base].text.strip()}\n{label}"
    if label in ("NLL", "entropy"):
        kind = next(
            kind for kind in (OWN, BUNDLED, NEUTRAL) if name in (text_figure(kind, "nll"), text_figure(kind, "entropy"))
        )
        return f"{LABELS[text_figure(kind, 'kl')].text.split(':')[0]}: {label}"
    return label


def _text(value: float | None, interval: Interval | None, is_share: bool, *, sign: bool = False) -> str:
    if value is None:
        return ""
    form = f"{{:{'+' if sign else ''}{'.1%' if is_share else '.4g' if abs(value) >= 100 else '.3f'}}}"
    bounds = "" if interval is None else f" [{form.format(interval.low)}, {form.format(interval.high)}]"
    return form.format(value) + bounds.replace("[", "\\[")


def is_evaluation(path: Path) -> bool:
    """Whether a file holds what `as_json` returns."""
    value = read_json_object(path)
    return value is not None and {"model", "intervals", *FIRST_KEYS} <= value.keys()


def is_our_plot(path: Path) -> bool:
    """Whether a file is a picture of `plot`."""
    return MARK.encode() in path.read_bytes()


def plot(path: Path, evaluations: Sequence[Evaluation], seed: int = 0) -> None:
    """Draw the figures with their intervals: a panel for each figure, a point for each model.

    Args:
        path: of the picture; its suffix says of which kind.
        evaluations: at least one.
        seed: of the bootstrap.
    """
    from matplotlib.figure import Figure as Canvas

    names = [name for name in _names(evaluations) if _label(name).better or name.endswith(("entropy", "mean_length"))]
    names = [name for name in names if any(_value(evaluation, name) is not None for evaluation in evaluations)]
    columns = min(4, max(len(names), 1))
    rows = max(1, -(-len(names) // columns))
    canvas = Canvas(figsize=(3.1 * columns, 2.5 * rows + 0.35 * len(evaluations)), dpi=120, layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, name, evaluations, seed)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles = [
        canvas.axes[0].plot([], [], "o", color=f"C{place}", label=evaluation.model)[0]
        for place, evaluation in enumerate(evaluations)
    ]
    legend = canvas.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    for text in legend.get_texts():  # a path is no formula, and may not be UTF-8
        text.set(text=text.get_text().encode(errors="replace").decode(), parse_math=False)
    picture = BytesIO()
    key = "Software" if path.suffix == ".png" else "Creator"
    canvas.savefig(picture, format=path.suffix[1:], metadata={key: MARK})
    with open_output(path) as file:
        file.write(picture.getvalue())


def _draw_panel(axes: Any, name: str, evaluations: Sequence[Evaluation], seed: int) -> None:
    from matplotlib.ticker import PercentFormatter

    label = _label(name)
    for place, evaluation in enumerate(evaluations):
        value = _value(evaluation, name)
        if value is None:
            continue
        figure = evaluation.figures.get(name)
        interval = figure.interval(seed) if figure is not None else None
        # a bootstrap interval of few items may lie beside the value
        error = [[max(0, value - interval.low)], [max(0, interval.high - value)]] if interval else None
        axes.errorbar([place], [value], yerr=error, fmt="o", capsize=4, color=f"C{place}")
    if name.startswith("accuracy"):
        axes.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
    if name == "kendall_tau":
        axes.axhline(0.0, color="0.5", linestyle="--", linewidth=1)
    arrow = {1: " \N{UPWARDS ARROW}", -1: " \N{DOWNWARDS ARROW}", 0: ""}[label.better]
    axes.set_title(_title(name) + arrow, fontsize=9)
    axes.set_xlim(-0.6, len(evaluations) - 0.4)
    axes.set_xticks([])
    axes.grid(axis="y", alpha=0.3)
    if label.is_share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _value(evaluation: Evaluation, name: str) -> float | None:
    if name in evaluation.distinct:
        return evaluation.distinct[name]
    figure = evaluation.figures.get(name)
    return None if figure is None else figure.value
