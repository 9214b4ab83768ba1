"""Progress of answers: by tokens, with an estimate of those to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from buleyean_rl.inference import progress
from buleyean_rl.inference.progress import AnswerProgress
from buleyean_rl.inference.protocol import FAILED, Answer, ServerReport, Unanswered


class Shown:
    """Stands in for the bar."""

    def __init__(self, *_: Any) -> None:
        self.updates: list[tuple[float, float, str]] = []

    def update(self, completed: float, total: float, amount: str, figures: str = "") -> None:  # noqa: ARG002
        self.updates.append((completed, total, amount))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[AnswerProgress, list[tuple[float, float, str]]]]:
    monkeypatch.setattr(progress, "ProgressBar", Shown)

    def make_progress(*numbers: int) -> tuple[AnswerProgress, list[tuple[float, float, str]]]:
        made = AnswerProgress(Console(quiet=True), "answering", *numbers)
        return made, made._bar.updates  # type: ignore[attr-defined]

    return make_progress


def test_it_moves_with_tokens_before_any_answer_is_done(make: Callable[..., Any]) -> None:
    shown, updates = make(10, 128)
    for _ in range(3):
        shown.add_tokens(8)
    assert updates == [(8, 1280, "0 of 10 answers"), (16, 1280, "0 of 10 answers"), (24, 1280, "0 of 10 answers")]


def test_answers_that_end_early_shorten_what_is_expected(make: Callable[..., Any]) -> None:
    shown, updates = make(4, 100, 6)
    shown.add_tokens(60)
    shown.add_outcome(Answer("", 20, True))
    (_, before, _), (completed, total, amount) = updates
    assert completed == 60
    assert 20 + 3 * 30 < total < before == 400
    assert amount == "7 of 10 answers"


def test_what_answers_under_way_have_drawn_is_not_expected_again(make: Callable[..., Any]) -> None:
    shown, updates = make(8, 100)
    shown.add_tokens(8 * 90)
    assert updates[-1][:2] == (720, 800)
    shown.add_outcome(Answer("", 90, True))
    assert 720 < updates[-1][1] < 720 + 7 * 10


def test_the_last_answer_completes_it(make: Callable[..., Any]) -> None:
    shown, updates = make(3, 10)
    shown.add_tokens(14)
    for outcome in (Answer("", 10, False), Answer("", 4, True), Unanswered(FAILED, "gone")):
        shown.add_outcome(outcome)
    assert updates[-1] == (14, 14, "3 of 3 answers")


def test_an_engine_that_counts_no_tokens_is_shown_by_answers(make: Callable[..., Any]) -> None:
    shown, updates = make(2, 10)
    shown.add_outcome(Answer("", None, True))
    assert updates == [(1, 2, "1 of 2 answers")]


def test_of_several_servers_it_says_what_each_did() -> None:
    console = Console(record=True, width=200, force_terminal=True)
    servers = [ServerReport("http://a:1/v1", "m"), ServerReport("http://b/v1", "m", given_up="gone")]
    shown = AnswerProgress(console, "answering", 1, 10, servers=servers)
    servers[0].answers = 1203
    shown.add_outcome(Answer("", None, True))
    shown.close()
    assert "a:1 1,203, b 0 (given up)" in console.export_text()
