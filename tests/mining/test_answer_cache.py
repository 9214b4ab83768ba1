"""Answers are drawn once for a model and a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from buleyean_rl.mining.answer_cache import cached_answers
from parrot import Parrot

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, use_cache: Callable[[Path], None]) -> Path:
    use_cache(tmp_path)
    return tmp_path / "buleyean-rl"


def ask(parrot: Parrot, fingerprint: str = "model", prompts: Sequence[str] = ("é", "b"), tokens: int = 8) -> list[str]:
    return cached_answers(lambda: parrot, fingerprint, prompts, tokens, QUIET, "answering")


def test_a_model_answers_once() -> None:
    parrot = Parrot()
    assert ask(parrot) == ask(parrot) == ["É", "B"]
    assert (len(parrot.asked), parrot.closed) == (1, 1)
    conversations, sampling = parrot.asked[0]
    assert conversations == [[{"role": "user", "content": "é"}], [{"role": "user", "content": "b"}]]
    assert (sampling.max_tokens, sampling.temperature) == (8, 0)


def test_another_question_is_asked_anew() -> None:
    parrot = Parrot()
    ask(parrot)
    for other in ({"fingerprint": "another model"}, {"prompts": ("b", "é")}, {"prompts": ("éb",)}, {"tokens": 9}):
        parrot.asked.clear()
        ask(parrot, **other)  # type: ignore[arg-type]
        assert len(parrot.asked) == 1


def test_an_engine_that_fails_is_closed_and_leaves_no_answers(cache: Path) -> None:
    parrot = Parrot()
    parrot.answers = lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        ask(parrot)
    assert (parrot.closed, list(cache.glob("answers-*"))) == (1, [])
