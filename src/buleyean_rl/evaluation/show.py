"""What `buleyean evaluate` says of its measurements: one JSON object, and lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buleyean_rl.evaluation.differences import CANNOT_TELL, Difference, differences, judge
from buleyean_rl.evaluation.labels import format_figure, label_of, name_and_direction, shown_names, value_of
from buleyean_rl.evaluation.measure import Evaluation
from buleyean_rl.evaluation.statistics import Interval
from buleyean_rl.system.files import read_json_object

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
NAME_WIDTH, VALUE_WIDTH, DIFFERENCE_WIDTH = 22, 21, 24  # characters: with the judgement, 80
COUNTS = {
    "answers_cut": "answers cut at the length limit",
    "answers_without_room": "answers without room: left out",
    "empty_answers": "blank answers left out",
    "bad_rows": "bad rows left out",
    "prompts_unanswered": "prompts without an answer: left out",
}


def as_json(evaluations: Sequence[Evaluation], seed: int = 0) -> dict[str, Any]:
    """The first evaluation as one object, the others in its `compare`.

    Args:
        evaluations: at least one, over the same items.
        seed: of the bootstrap.
    """
    first, *others = evaluations
    compare = []
    for other in others:
        subtracted = {
            name: {"difference": difference.value, "interval": _as_list(difference.interval)}
            for name, difference in differences(first, other, seed).items()
        }
        compare.append(_evaluation_json(other, seed) | {"differences": subtracted})
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


def is_evaluation(path: Path) -> bool:
    """Whether a file holds what `as_json` returns."""
    value = read_json_object(path)
    return value is not None and {"model", "intervals", *FIRST_KEYS} <= value.keys()


def _pairs(evaluation: Evaluation, name: str) -> int | None:
    """The number of pairs that an accuracy is over."""
    figure = evaluation.figures.get(name)
    return None if figure is None else int(figure.items[:, 1].sum())


def _as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def table(evaluations: Sequence[Evaluation], seed: int = 0) -> list[str]:
    """The figures with 95% intervals, as lines of at most 80 characters: one model's, or several below each figure.

    Args:
        evaluations: at least one, over the same items; the others are compared with the first.
        seed: of the bootstrap.
    """
    first, *others = evaluations
    names = shown_names(evaluations)
    if not others:
        width = max((len(label_of(name).text) for name in names), default=0)
        rows = [f"{label_of(name).text:{width}}  {_cell(first, name, seed)}" for name in names]
        return [f"{first.model}; in brackets, where 95 of 100 repetitions fall", *rows]
    subtracted: list[dict[str, Difference]] = [{}, *(differences(first, other, seed) for other in others)]
    lines = [
        "In brackets, where 95 of 100 repetitions fall.",
        f"The last column is {first.model} less the model of the line; of shares, in points.",
    ]
    for name in names:
        lines.append(name_and_direction(name))
        for evaluation, figures in zip(evaluations, subtracted, strict=True):
            if value_of(evaluation, name) is not None:
                cells = _difference_cells(name, figures.get(name))
                lines += _row(evaluation.model, _cell(evaluation, name, seed), *cells)
    return lines


def _cell(evaluation: Evaluation, name: str, seed: int) -> str:
    figure = evaluation.figures.get(name)
    interval = None if figure is None else figure.interval(seed)
    return format_figure(value_of(evaluation, name), interval, label_of(name).unit)


def _difference_cells(name: str, difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    word = judge(name, difference)
    text = format_figure(difference.value, difference.interval, label_of(name).unit, is_difference=True)
    return text, "" if word == CANNOT_TELL else word


def _row(model: str, value: str, difference: str = "", judgement: str = "") -> list[str]:
    """A model's line; a long name takes several."""
    *above, last = textwrap.wrap(model, NAME_WIDTH, break_on_hyphens=False) or [""]
    row = f"{last:{NAME_WIDTH}} {value:>{VALUE_WIDTH}}  {difference:>{DIFFERENCE_WIDTH}} {judgement}"
    return [f"  {line}".rstrip() for line in (*above, row)]


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the table should know: counts that are not zero, and how it was measured."""
    pairs, matched = _pairs(evaluation, "accuracy"), _pairs(evaluation, "accuracy_length_matched")
    counts = [f"pairs: {pairs:,}, of like length {matched:,}"] if pairs is not None else []
    counts += [f"{label}: {evaluation.counts[name]:,}" for name, label in COUNTS.items() if evaluation.counts.get(name)]
    return [*(f"{evaluation.model}: {count}" for count in counts), *evaluation.notes]
