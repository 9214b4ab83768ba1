"""The study of kinds: its judges by hand, its log, and a run on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import edits
import tasks
from buleyean_rl.inference.protocol import Answer, Sampling
from harness import Summary
from kinds import KINDS, Kind, beyond_the_limit, list_marks
from tasks import UNSEEN, Look, Study
from tiny import tiny_llama, tiny_tokenizer


def said(text: str, *, ended: bool = True) -> Answer:
    return Answer(text, len(text.split()), ended)


@pytest.mark.parametrize(
    ("kind", "rejected", "accepted"),
    [
        ("loops", said("and so it goes on " * 8), said("A short answer that says it once.")),
        ("length", said("word " * 61), said("word " * 60)),
        ("length", said("Cut off", ended=False), said("Done.")),
        ("format", said("Here:\n1. Sleep\n2. Eat"), said("On 1 May we slept - and ate.\n- Bob")),
        ("format", said("# Title\n**Sleep**\nWell."), said("It is **very** good, # 1.")),
        ("ai_talk", said("As an AI, I do not sleep."), said("I sleep well, and artificially.")),
        ("ai_talk", said("I don't have personal opinions."), said("I don't have a car.")),
    ],
)
def test_judges(kind: str, rejected: Answer, accepted: Answer) -> None:
    assert KINDS[kind].is_rejected(rejected)
    assert not KINDS[kind].is_rejected(accepted)


def test_a_list_is_wrong_at_its_marks() -> None:
    text = "Two:\n- Sleep - well\n  2) Eat"
    assert [text[start:end] for start, end in list_marks(text)] == ["- ", "  2) "]


def test_too_long_is_what_follows_the_last_word_there_may_be() -> None:
    text = "word " * 60 + "and  more "
    assert [text[start:end] for start, end in beyond_the_limit(text)] == ["and  more"]
    assert beyond_the_limit("word " * 60) == ()


@pytest.fixture
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    for part in (tiny_llama(tokenizer), tokenizer):
        part.save_pretrained(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (tasks, edits):
        monkeypatch.setattr(module, "BUNDLED", str(folder))
    (tmp_path / "prompts.txt").write_text("".join(f"Give me tip {n}.\n" for n in range(12)))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The two cats sat on the mat."}) + "\n")
    return tmp_path


def test_the_parts_are_apart(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "UNSEEN", {"validation": 3, "test": 4})
    study = Study(tiny_base / "study", [f"{n}" for n in range(12)], {}, "test")
    parts = [study.prompts(KINDS["loops"], part) for part in ("training", *UNSEEN)]
    assert list(map(len, parts)) == [5, 3, 4]
    assert sorted(prompt for part in parts for prompt in part) == sorted(f"{n}" for n in range(12))


@pytest.fixture
def tiny_tasks(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a study of one kind, of which everything is rejected, and of one variant."""
    monkeypatch.setattr(tasks, "UNSEEN", {"validation": 2, "test": 2})
    monkeypatch.setattr(tasks, "TOKENS", 12)
    monkeypatch.setattr(tasks, "GREEDY", Look("t0", Sampling(12), 2))
    looks = {"validation": (tasks.GREEDY,), "test": (tasks.GREEDY, Look("512", Sampling(14), 1))}
    monkeypatch.setattr(tasks, "LOOKS", looks)
    every = Kind(lambda _: True, lambda _: (), list)
    monkeypatch.setitem(KINDS, "length", every)
    monkeypatch.setattr(tasks, "VARIANTS", {"log": tasks.Variant({"anchors": 0, "lora_rank": 4})})
    texts = str(tiny_base / "texts.jsonl")
    arguments = ["--prompts", str(tiny_base / "prompts.txt"), "--c4", texts, "--wikitext", texts]
    return ["tasks.py", *arguments, "-o", str(tiny_base / "study"), "--kind", "length", "--variant", "log"]


def test_a_run_has_a_row_as_it_was_trained_and_one_at_a_kl(
    tiny_tasks: list[str], tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", tiny_tasks)
    tasks.main()
    rows = Summary(tiny_base / "study").rows
    assert set(rows) == {"length-base", "length-log", "length-log-scaled"}
    assert rows["length-log"]["records"] == 8
    assert rows["length-log"]["kl_c4"] > 0
    assert "| length-log-scaled | 100% |" in capsys.readouterr().out
    monkeypatch.setattr(tasks, "train_adapter", None)
    tasks.main()  # which finds all of it done
    monkeypatch.setattr(sys, "argv", [*tiny_tasks, "--test"])
    tasks.main()  # with the same adapter
    rows = Summary(tiny_base / "study").rows
    assert rows["length-log-test"]["rejected_512"] == 1


@pytest.mark.usefixtures("tiny_tasks")
def test_samples_of_a_prompt_are_one_record_with_what_was_accepted(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Kind(lambda answer: len(answer.text) % 2 == 1, lambda _: (), list)
    monkeypatch.setitem(KINDS, "length", odd)
    monkeypatch.setattr(tasks, "SAMPLE_TOKENS", 6)
    study = Study(tiny_base / "study", [f"Give me tip {n}." for n in range(12)], {}, "validation")
    records = study.records("length", samples=3)
    assert len(records) == 8
    for record in records:
        rejected = [len(answer) % 2 for answer in record.rejected_responses]
        assert list(record.rejection_counts) == rejected


def test_edits_have_rows_alone_and_together(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edits, "OTHERS", 3)
    monkeypatch.setattr(edits, "TOKENS", 12)
    monkeypatch.setattr(edits, "VARIANTS", {"few": {"lora_rank": 4}})
    arguments = ["--prompts", str(tiny_base / "prompts.txt"), "--edits", "2", "--together", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["edits.py", *arguments, "--scales", "1", "0.1", "-o", str(tiny_base / "study")])
    edits.main()
    rows = Summary(tiny_base / "study").rows
    assert set(rows) == {f"few-{run}-x{scale}" for run in ("0-of1", "1-of1", "0-of2") for scale in ("1", "0.1")}
    assert rows["few-0-of1-x0.1"]["others_unchanged"] >= rows["few-0-of1-x1"]["others_unchanged"]
    assert rows["few-0-of2-x1"]["edits"] == 2
    assert "| few | 2 | 0.1 |" in capsys.readouterr().out
