"""What a run's verdict says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.void.verdict import is_unlearned, read_verdict

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


@pytest.mark.parametrize(
    ("spans", "after", "unlearned"),
    [
        ([], "Sleep more. Sleep more.", False),
        ([], "I say:  Sleep\nmore. Sleep more.", False),  # whatever the white space
        ([], "Sleep more.", True),
        ([(12, 23)], "First, Sleep more.", False),
        ([(12, 23)], "Dim the lights.", True),
        ([(11, 12)], "Dim the lights.", True),  # white space alone is nothing that could come again
    ],
)
def test_what_was_rejected_comes_again_or_not(spans: list[tuple[int, int]], after: str, unlearned: bool) -> None:
    assert is_unlearned("Sleep more. Sleep more.", tuple(spans), after) is unlearned


def test_who_begins_the_same_again_has_not_unlearned_it() -> None:
    assert not is_unlearned("word " * 100, (), "word " * 50 + "and then another end")
