"""Answers to rejections: what loops is rejected where it repeats, and no model is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.engines import Sampling
from buleyean_rl.mine import ROUNDS, cached_answers, reject_loops


class Parrot:
    """An engine that says a prompt back in capitals, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Sampling]] = []
        self.closed = 0

    def complete_many(
        self, conversations: Sequence[Any], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[str]:
        self.asked.append((conversations, sampling))
        if on_done is not None:
            on_done(len(conversations))
        return [conversation[-1]["content"].upper() for conversation in conversations]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "buleyean-rl"


def ask(parrot: Parrot, fingerprint: str = "model", prompts: Sequence[str] = ("é", "b"), tokens: int = 8) -> list[str]:
    return cached_answers(lambda: parrot, fingerprint, prompts, tokens)  # type: ignore[arg-type, return-value]


def test_a_model_answers_once() -> None:
    parrot = Parrot()
    assert ask(parrot) == ask(parrot) == ["É", "B"]
    assert len(parrot.asked) == parrot.closed == 1
    conversations, sampling = parrot.asked[0]
    assert conversations == [[{"role": "user", "content": "é"}], [{"role": "user", "content": "b"}]]
    assert (sampling.max_tokens, sampling.temperature) == (8, 0)


@pytest.mark.parametrize(
    "other", [{"fingerprint": "another model"}, {"prompts": ("b", "é")}, {"prompts": ("éb",)}, {"tokens": 9}]
)
def test_another_question_is_asked_anew(other: dict[str, Any]) -> None:
    parrot = Parrot()
    ask(parrot)
    ask(parrot, **other)
    assert len(parrot.asked) == 2


def test_an_engine_that_fails_is_closed_and_leaves_no_answers(cache: Path) -> None:
    parrot = Parrot()
    parrot.complete_many = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        ask(parrot)
    assert parrot.closed == 1
    assert not list(cache.glob("answers-*"))


def test_progress_is_told() -> None:
    told: list[int] = []
    cached_answers(Parrot, "model", ["a", "b"], 8, told.append)  # type: ignore[arg-type]
    assert told == [2]


def test_only_loops_are_rejected_and_only_where_they_repeat() -> None:
    loop = "Sleep well! Go to bed early. Go to bed early. Go to bed early."
    (record,) = reject_loops(["p", "q"], ["A fine answer.", loop])
    assert (record.prompt, record.rejected_responses) == ("q", (loop,))
    assert (record.rejection_counts, record.total_rounds) == ((ROUNDS,), ROUNDS)
    ((span,),) = record.rejected_spans
    assert loop[slice(*span)] == "Go to bed early. Go to bed early."
    assert span[0] > loop.index("Go to bed early.")


def test_prompts_and_answers_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        reject_loops(["p", "q"], ["a"])
