"""What a person sees of work under way, on a terminal and in a pipe."""

from __future__ import annotations

import io
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console

from buleyean_rl.system import progress
from buleyean_rl.system.progress import ProgressBar, working


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_a_pipe_gets_a_line_every_some_seconds_and_ever_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(monkeypatch), io.StringIO()
    with ProgressBar(Console(file=seen, width=40), "answering [b]", 2000, 1000) as bar:
        times = []
        for second in range(1, 1001):
            clock.now = 100.0 + second
            before = seen.tell()
            bar.update(1000 + second, 2000, f"{second} of 1,000 answers", "9 tokens/s")
            if seen.tell() > before:
                times.append(second)
    assert times[:3] == [4, 8, 12]
    assert all(4 <= later - earlier <= 61 for earlier, later in pairwise(times[12:]))
    lines = seen.getvalue().splitlines()
    assert len(lines) == len(times) < 60
    assert lines[0] == "answering [b]: 4 of 1,000 answers, about 17 minutes left: 9 tokens/s"


def test_a_new_estimate_of_the_total_moves_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(monkeypatch), io.StringIO()
    bar = ProgressBar(Console(file=seen, width=80), "answering", 100)
    clock.now += 10
    bar.update(0, 100, "none")
    clock.now += 10
    bar.update(20, 100, "some")
    clock.now += 10
    bar.update(30, 60, "more")
    assert seen.getvalue().splitlines() == [
        "answering: none",
        "answering: some, about 80 seconds left",
        "answering: more, about 30 seconds left",
    ]


def test_a_terminal_gets_a_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(monkeypatch), io.StringIO()
    with ProgressBar(Console(file=seen, width=80, force_terminal=True, color_system=None), "answering", 9) as bar:
        clock.now += 5
        bar.update(5, 9, "1 of 2 answers")
        bar.update(9, 9, "2 of 2 answers", "7 tokens/s")
    bar_line, figures = seen.getvalue().split("answering")[-1].splitlines()[:2]
    assert "2 of 2 answers" in bar_line
    assert "0:00:00" in bar_line
    assert figures.strip().startswith("7 tokens/s")


def test_what_takes_an_unknown_time_is_named_in_a_pipe() -> None:
    seen = io.StringIO()
    with working(Console(file=seen), "loading [it]"):
        assert seen.getvalue() == "loading [it]\n"
    with working(Console(file=seen, quiet=True), "silence"):
        pass
    assert seen.getvalue() == "loading [it]\n"
