"""What a run's verdict says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.records import Spans
from buleyean_rl.inference.protocol import Answer
from buleyean_rl.void.store.rejections import RejectedAnswer
from buleyean_rl.void.verdict import is_unlearned, read_verdict, returned_share

DRIFT = {"own": {"kl": 0.02, "entropy_base": 3.0, "entropy": 3.1, "nll_base": 3.0, "nll": 3.2}}
REPORT = {"rejected_nll_base": 0.5, "rejected_nll_final": 2.5, "drift": DRIFT, "guard": None}


def verdict(folder: Path, *unlearned: bool | None, **changes: Any) -> Any:
    (folder / "run.json").write_text(json.dumps(REPORT | changes))
    return read_verdict(folder, [{"unlearned": each} for each in unlearned])


def test_a_verdict_is_what_training_did(tmp_path: Path) -> None:
    assert read_verdict(tmp_path, []) is None
    assert verdict(tmp_path, True, True) == {
        "outcome": "good",
        "unlearned": 2,
        "asked": 2,
        "other_text": "unchanged",
        "details": {
            "rejected_nll": [0.5, 2.5],
            "drift": {"own": {"kl": 0.02, "entropy": [3.0, 3.1]}},
            "stop_reason": None,
        },
    }
    (tmp_path / "run.json").write_text(json.dumps({"drift": DRIFT}))  # of an earlier version
    assert read_verdict(tmp_path, []) is None


@pytest.mark.parametrize(
    ("unlearned", "changes", "outcome"),
    [
        ([True, False], {}, "partly"),
        ([False, False], {}, "nothing"),
        ([None], {}, "good"),  # of an earlier version: what is known are the probabilities
        ([], {"rejected_nll_final": 0.5}, "nothing"),
        ([True], {"guard": {"stop_reason": "too far"}}, "guard"),
    ],
)
def test_outcomes(tmp_path: Path, unlearned: list[bool], changes: dict[str, Any], outcome: str) -> None:
    assert verdict(tmp_path, *unlearned, **changes)["outcome"] == outcome


@pytest.mark.parametrize(("kl", "words"), [(0.0, "unchanged"), (0.05, "slightly"), (0.2, "changed")])
def test_other_text(tmp_path: Path, kl: float, words: str) -> None:
    drift = {"own": DRIFT["own"], "bundled": DRIFT["own"] | {"kl": kl}}
    assert verdict(tmp_path, drift=drift)["other_text"] == words


LOOP = "Two tips: keep a schedule. " + "Go to bed at the same time every night. " * 8
REPEATS = ((LOOP.index("Go", 40), len(LOOP)),)


@pytest.mark.parametrize(
    ("answer", "spans", "after", "share"),
    [
        ("Sleep more. Sleep more.", (), "I say:  sleep\nmore. Sleep more.", 1),  # whatever the white space
        ("Sleep more. Sleep more.", (), "Dim the lights.", 0),
        ("Sleep more, and dim the lights.", ((0, 10),), "You could sleep more.", 1),  # a few words are looked for
        ("Sleep more. Now.", ((11, 12),), "Sleep more. Now.", 0),  # white space is nothing that could come again
        ("", (), "", 1),
        ("", (), "Sleep.", 0),
        (LOOP, REPEATS, LOOP, 1),
        (LOOP, REPEATS, LOOP[: REPEATS[0][0]] + "Dim the lights.", 0),  # said once it is no repeat
        (LOOP, REPEATS, "Dim the lights, and have a bed that you like at night, every night of the year.", 0),
        ("我是一个语言模型，我没有感情。", ((0, 8),), "作为我是一个语言模型。", 1),
    ],
)
def test_what_was_rejected_comes_again_or_not(answer: str, spans: Spans, after: str, share: float) -> None:
    assert returned_share(answer, spans, after) == share


def test_who_begins_the_same_again_and_goes_on_half_as_long_has_not_unlearned_it() -> None:
    assert returned_share("word " * 100, (), "word " * 50 + "and then another end") == 0.5
    assert unlearned("word " * 50 + "and then another end", RejectedAnswer("word " * 100, (), True)) is False


def unlearned(
    after: str, *rejected: RejectedAnswer, ended: bool = True, before: str | None = None, whole: bool = True
) -> bool | None:
    base = None if before is None else Answer(before, None, whole)
    return is_unlearned(rejected, Answer(after, None, ended), base)


def test_it_counts_as_unlearned_where_it_would_have_come_again() -> None:
    here, elsewhere = (RejectedAnswer("Sleep more, and longer.", (), is_greedy) for is_greedy in (True, False))
    assert unlearned("Dim the lights.", here) is True
    assert unlearned("Dim the lights.", elsewhere, before="Sleep more, and longer.") is True
    assert unlearned("Dim the lights.", elsewhere, before="Eat less.") is None  # it never said so
    assert unlearned("Sleep more, and longer.", elsewhere, before="Eat less.") is False
    assert unlearned("Dim the lights.", RejectedAnswer("Eat less.", (), True), here) is True
    assert unlearned("Sleep more, and longer.", RejectedAnswer("Eat less.", (), True), here) is False


def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes() -> None:
    rejected = RejectedAnswer("One two three four five six. " * 9, (), True)
    assert unlearned("One two three four five six.", rejected) is True  # it ended there
    assert unlearned("One two three four five six.", rejected, ended=False) is False
    late = RejectedAnswer(rejected.text, ((200, 220),), True)
    assert unlearned("One two three four five six.", late, ended=False) is None
