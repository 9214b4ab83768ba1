"""What is said of measurements: words, lines, verdicts and pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from buleyean_rl.evaluation.differences import verdict
from buleyean_rl.evaluation.forest_plot import plot
from buleyean_rl.evaluation.labels import LABELS
from buleyean_rl.evaluation.measure import Evaluation
from buleyean_rl.evaluation.show import notes, table
from buleyean_rl.evaluation.statistics import Figure


def evaluation(name: str, loops: int, kl: float | None = None, of: int = 40) -> Evaluation:
    """A model of whose answers so many loop."""
    figures = {
        "loop_rate": Figure([(float(i < loops), 1.0) for i in range(of)]),
        "mean_length": Figure([(100.0 + i, 1.0) for i in range(of)]),
    }
    if kl is not None:
        figures["own_kl"] = Figure([(kl * tokens, float(tokens)) for tokens in range(10, 20)])
    return Evaluation(name, "base", figures=figures, distinct={"distinct_4": 0.5})


RUN, BASE, LONG = evaluation("run", 2, 0.02), evaluation("base", 20), evaluation("folder/" * 8 + "run", 3, 0.02)


@pytest.mark.parametrize("models", [[RUN], [RUN, BASE], [RUN, BASE, LONG, evaluation("c", 9), evaluation("d", 39)]])
def test_a_table_fits_80_columns_with_intervals(models: Sequence[Evaluation]) -> None:
    lines = table(models)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(piece in text for model in models for piece in re.findall(r"\w+", model.model))
    assert text.count("5.0% [1.4, 16.5]") == 1
    assert text.count("answers that loop") == 1


def test_a_difference_is_judged_by_its_interval_and_its_direction() -> None:
    assert verdict(RUN, BASE) == "run against base: better in answers that loop; its drift is KL 0.020 nats per token"
    assert verdict(BASE, RUN) == "base against run: worse in answers that loop"
    same = verdict(RUN, evaluation("other", 3, 0.02))
    assert same == "run against other: cannot tell; its drift is KL 0.020 nats per token"
    farther = verdict(RUN, evaluation("other", 3, 0.03))
    assert "better in own passages: KL from the reference; cannot tell in 1 other;" in farther
    rows = [line for line in table([RUN, BASE]) if line.endswith("better")]
    assert len(rows) == 1
    assert "-45.0 [" in rows[0]


def test_passages_of_two_bases_are_not_compared() -> None:
    other = evaluation("other", 3, 0.9)
    other.base = "another"
    assert "own passages" not in verdict(RUN, other)
    assert sum("own passages" in line for line in table([RUN, other])) == 1


def test_a_name_says_by_itself_what_it_is_of() -> None:
    texts = [label.text for label in LABELS.values()]
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if text != text.strip() or text.split()[0] in ("by", "of", "to", "that")]


def test_how_answers_were_drawn_is_part_of_the_name() -> None:
    drawn = evaluation("m", 2)
    drawn.figures["loop_rate_t0.8_512"] = drawn.figures["loop_rate"]
    assert any(line.startswith("answers that loop, at temperature 0.8, 512 tokens ") for line in table([drawn]))


def test_what_was_left_out_is_said_of_its_model() -> None:
    left_out = Evaluation("m", counts={"bad_rows": 2, "answers_cut": 0}, notes=["m: a note"])
    assert notes(left_out) == ["m: bad rows left out: 2", "m: a note"]


@pytest.mark.parametrize("others", [[], [BASE], [BASE, LONG]])
def test_a_plot_says_which_differences_are_better(others: Sequence[Evaluation], tmp_path: Path) -> None:
    plot(tmp_path / "p.svg", [RUN, *others])
    drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / "p.svg").read_text())
    names = [name.removesuffix(" (less is better)") for name in drawn]
    assert names.count("answers that loop") == 1
    assert ("-45.0 [" in "".join(drawn)) == bool(others)
    assert ("better" in drawn) == bool(others)


def test_a_plot_names_models_as_they_are_called(tmp_path: Path) -> None:
    names = ("$\\frac{$", "_hidden", os.fsdecode(b"caf\xe9"))
    plot(tmp_path / "p.svg", [Evaluation(name, figures={"accuracy": Figure([(1.0, 1.0)] * 2)}) for name in names])
    drawn = (tmp_path / "p.svg").read_text()
    assert all(name in drawn for name in (f"<!-- {names[0]}, compared", "<!-- less _hidden -->", "<!-- less caf? -->"))


def test_a_plot_of_one_figure_and_of_none(tmp_path: Path) -> None:
    for figures in ({"accuracy": Figure([(1.0, 1.0)])}, {}):
        plot(tmp_path / "p.png", [Evaluation("m", figures=figures)])
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
