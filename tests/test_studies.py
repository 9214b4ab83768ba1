"""The studies from end to end on a tiny model: that they run, go on where they stopped, and show what there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import harness
import own_loops
from buleyean_rl.records import RejectionRecord, make_record
from harness import Method
from tiny import tiny_llama, tiny_tokenizer


def reject_all(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    return [make_record(*pair, [60], 60) for pair in zip(prompts, ([answer] for answer in answers), strict=True)]


@pytest.fixture
def tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a study of two runs on a model made on the spot."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(harness, "base", lambda: tiny_llama(tokenizer))
    monkeypatch.setattr(own_loops, "load_tokenizer", lambda _name: tokenizer)
    monkeypatch.setattr(own_loops, "METHODS", [Method("complement", 1e-3), Method("npo", 1e-3, seed=7)])
    monkeypatch.setattr(own_loops, "reject_loops", reject_all)
    monkeypatch.setattr(own_loops, "UNSEEN", 4)
    monkeypatch.setattr(own_loops, "NEUTRAL", 2)
    monkeypatch.setattr(harness, "ANSWER_TOKENS", 60)
    prompts, neutral = tmp_path / "prompts.txt", tmp_path / "neutral.jsonl"
    prompts.write_text("".join(f"Give me tip {n}.\n" for n in range(20)))
    neutral.write_text("".join(json.dumps({"text": f"The {n} cats sat on the mat."}) + "\n" for n in range(2)))
    files = ["--prompts", str(prompts), "--neutral", str(neutral)]
    return ["own_loops.py", *files, "--mined", "12", "-o", str(tmp_path / "study")]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    own_loops.main()


def test_a_study_runs_once_and_shows_its_table(
    tiny_study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_study, monkeypatch)
    folder = Path(tiny_study[-1])
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(runs) == {"base", "complement-lr0.001-seed42", "npo-lr0.001-seed7"}
    for figures in runs.values():
        assert len(figures["loops"]) == 4
        assert figures["loop_rate"] == sum(figures["loops"]) / 4
    assert runs["complement-lr0.001-seed42"]["rejected_nll"] != runs["base"]["rejected_nll"]
    printed = capsys.readouterr().out
    assert "| npo-lr0.001-seed7 |" in printed
    assert "| complement-lr0.001 |" in printed
    assert (folder / "pareto.png").stat().st_size > 0

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("everything was done already")

    monkeypatch.setattr(harness, "train", never)
    run(tiny_study, monkeypatch)
    assert capsys.readouterr().out == printed[printed.index("| run") :]


def test_nothing_to_train_on_is_told(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loops, "reject_loops", lambda *_: [])
    with pytest.raises(SystemExit, match="nothing to train on"):
        run(tiny_study, monkeypatch)


def test_too_few_prompts_are_told(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study[tiny_study.index("12")] = "100"
    with pytest.raises(SystemExit, match="104 are needed"):
        run(tiny_study, monkeypatch)
