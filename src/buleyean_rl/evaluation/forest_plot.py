"""A forest plot of evaluations: the differences of the first model from the others, or without others its figures."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from buleyean_rl.evaluation.differences import BETTER, WORSE, differences, judge
from buleyean_rl.evaluation.labels import SHARE, format_figure, label_of, name_and_direction, shown_names, value_of
from buleyean_rl.evaluation.measure import Evaluation
from buleyean_rl.evaluation.statistics import Interval
from buleyean_rl.system.outputs import open_output

MARK = "buleyean-rl evaluate"  # in a picture's metadata
PICTURES = (".png", ".svg", ".pdf")
COLORS = {BETTER: "#0072B2", WORSE: "#D55E00"}  # told apart by the colour-blind, and by the form of their points
FORMS = {BETTER: "o", WORSE: "s"}
NEUTRAL_COLOR, NEUTRAL_FORM = "0.45", "D"
ROW_INCHES, WIDTH_INCHES = 0.27, 7.4


class Row(NamedTuple):
    """A line of the plot.

    Args:
        text: on the left.
        value: None for a heading.
        interval: of the value.
        unit: of the value; the rows of one unit share an axis.
        judgement: see `differences.judge`.
    """

    text: str
    value: float | None
    interval: Interval | None
    unit: str
    judgement: str = ""


def is_our_plot(path: Path) -> bool:
    """Whether a file is a picture of `plot`."""
    return MARK.encode() in path.read_bytes()


def plot(path: Path, evaluations: Sequence[Evaluation], seed: int = 0) -> None:
    """Draw a forest plot.

    Args:
        path: of the picture; its suffix says of which kind.
        evaluations: at least one, over the same items.
        seed: of the bootstrap.
    """
    from matplotlib.figure import Figure as Canvas

    first, *others = evaluations
    rows = _difference_rows(first, others, seed) if others else _figure_rows(first, seed)
    by_unit = {unit: [row for row in rows if row.unit == unit] for unit in dict.fromkeys(row.unit for row in rows)}
    heights = [len(members) for members in by_unit.values()] or [1]
    canvas = Canvas(
        figsize=(WIDTH_INCHES, ROW_INCHES * sum(heights) + 0.62 * len(heights) + 0.7), dpi=150, layout="constrained"
    )
    panels = canvas.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flatten()
    for axes, (unit, members) in zip(panels, by_unit.items(), strict=False):
        _draw_panel(axes, unit, members, bool(others))
    _add_title(canvas, first, others)
    picture = BytesIO()
    canvas.savefig(picture, format=path.suffix[1:], metadata={"Software" if path.suffix == ".png" else "Creator": MARK})
    with open_output(path) as file:
        file.write(picture.getvalue())


def _figure_rows(evaluation: Evaluation, seed: int) -> list[Row]:
    rows = []
    for name in shown_names([evaluation]):
        figure, label = evaluation.figures.get(name), label_of(name)
        interval = None if figure is None else figure.interval(seed)
        rows.append(Row(label.text, value_of(evaluation, name), interval, label.unit))
    return rows


def _difference_rows(first: Evaluation, others: Sequence[Evaluation], seed: int) -> list[Row]:
    """A row for each figure, or of several others a heading and a row for each."""
    subtracted = [(other.model, differences(first, other, seed)) for other in others]
    rows = []
    for name in shown_names([first, *others]):
        unit, title = label_of(name).unit, name_and_direction(name)
        members = [
            Row(model, figures[name].value, figures[name].interval, unit, judge(name, figures[name]))
            for model, figures in subtracted
            if name in figures and figures[name].value is not None
        ]
        if len(others) == 1:
            rows += [member._replace(text=title) for member in members]
        elif members:
            rows.append(Row(title, None, None, unit))
            rows += [member._replace(text=f"less {member.text}") for member in members]
    return rows


def _draw_panel(axes: Any, unit: str, rows: Sequence[Row], are_differences: bool) -> None:
    """The rows of a unit, the first at the top, with their numbers on the right."""
    factor = 100.0 if unit == SHARE else 1.0
    places = range(len(rows) - 1, -1, -1)
    if are_differences:
        axes.axvline(0, color="0.3", linewidth=0.8)
    for place, row in zip(places, rows, strict=True):
        if row.value is None:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0)
            continue
        color, form = COLORS.get(row.judgement, NEUTRAL_COLOR), FORMS.get(row.judgement, NEUTRAL_FORM)
        if row.interval is not None:
            axes.plot([factor * bound for bound in row.interval], [place, place], color=color, linewidth=1.5)
        axes.plot([factor * row.value], [place], form, color=color, markersize=5)
        numbers = format_figure(row.value, row.interval, unit, is_difference=are_differences)
        axes.annotate(
            numbers,
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=color if row.judgement in COLORS else "0.2",
            annotation_clip=False,
        )
    _name_rows(axes, places, rows)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(_axis_label(unit, are_differences), fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _name_rows(axes: Any, places: Sequence[int], rows: Sequence[Row]) -> None:
    """Write the rows' names on the left; a path is no formula, and may not be UTF-8."""
    axes.set_yticks(list(places), ["" for _ in rows], fontsize=8)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set(parse_math=False, fontweight="bold" if row.value is None else "normal")
    axes.set_yticks(list(places), [_printable(row.text) for row in rows])


def _axis_label(unit: str, are_differences: bool) -> str:
    if unit == SHARE:
        return "points" if are_differences else "percent"
    return unit


def _add_title(canvas: Any, first: Evaluation, others: Sequence[Evaluation]) -> None:
    against = f" less {others[0].model}" if len(others) == 1 else ", compared" if others else ""
    title = canvas.suptitle("", fontsize=9)
    title.set_parse_math(False)
    title.set_text(f"{_printable(first.model)}{_printable(against)}, with 95% intervals")
    if others:
        words = ((BETTER, "better"), (WORSE, "worse"), ("", "cannot tell, or neither"))
        handles = [
            canvas.axes[0].plot(
                [], [], FORMS.get(word, NEUTRAL_FORM), color=COLORS.get(word, NEUTRAL_COLOR), markersize=5, label=text
            )[0]
            for word, text in words
        ]
        canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
