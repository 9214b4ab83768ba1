"""Records to training and held-out boundaries: long, empty and bad ones, and samples of the base model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import start

from buleyean_rl.data.records import (
    RejectionRecord,
    as_messages,
    make_record,
    read_records,
    records_sha256,
    write_records,
)
from buleyean_rl.errors import RecordError
from buleyean_rl.models.model import open_model
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training import dataset
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset, RecordsFile, load_dataset, split_records
from buleyean_rl.training.processes import ALONE
from tiny import CHATML, tiny_tokenizer


def test_records_that_are_all_too_long_are_refused(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"of 10 records, none can be trained on: .* raise --max-length"):
        start(base, rejections, tmp_path / "run", max_length=5)


def test_records_of_empty_answers_alone_say_so(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    write_records(path, [make_record("Hi", [""]), make_record("And?", [""])])
    with pytest.raises(RecordError, match="of 2 records, none can be trained on: every answer is empty"):
        start(base, path, tmp_path / "run")


def load(tmp_path: Path, records: list[RejectionRecord], objective: str = "complement", **settings: Any) -> Dataset:
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    model: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    values = {"own_samples": 0, "max_length": 64, "held_out": 0.0, "seed": 0, "max_rejected": None} | settings
    config: Any = SimpleNamespace(loss=Objective(objective), processes=ALONE, **values)  # type: ignore[arg-type]
    return load_dataset(RecordsFile(path, records_sha256(path)), model, config, Console(quiet=True))


def test_records_without_a_rejection_anchor_and_are_never_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accepted = [make_record(f"And {k}?", ["Yes.", "Go."], [0, 0], 3) for k in range(3)]
    records = [*accepted, make_record("Hi", ["No."]), make_record("Well?", ["No.", "Yes."], [1, 0])]
    loaded = load(tmp_path, records, held_out=0.9)
    assert [len(part) for part in (loaded.training, loaded.held_out, loaded.anchors)] == [1, 1, 3]
    assert loaded.describe() == "1 record to train on, 1 held out; 6 accepted answers to other prompts as anchors"
    # nothing to anchor to, and nothing to rank
    assert [len(load(tmp_path, records, name).training) for name in ("published", "listwise")] == [2, 1]
    with pytest.raises(RecordError, match=r"nothing is rejected in its 3 records: training needs one rejected answer"):
        load(tmp_path, accepted)


def test_equal_prompts_of_a_file_are_one_trie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "records.jsonl"
    write_records(path, [make_record("Hi", ["No."]), make_record("And?", ["Go."]), make_record("Hi", ["Why?"])])
    model: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    config: Any = SimpleNamespace(
        processes=ALONE, loss=Objective(), own_samples=0, max_length=64, held_out=0.0, seed=0, max_rejected=None
    )
    loaded = load_dataset(RecordsFile(path, records_sha256(path)), model, config, Console(quiet=True))
    assert [(trie.counts, trie.rounds) for trie in loaded.training] == [([1, 1], [1, 1]), ([1], [1])]


def test_a_file_that_is_written_to_is_not_cached_under_its_earlier_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "records.jsonl"
    write_records(path, [make_record("Hi", ["No."])])
    earlier = records_sha256(path)
    write_records(path, [make_record("Hi", ["No."]), make_record("And?", ["Go."])])
    model: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    config: Any = SimpleNamespace(
        processes=ALONE, loss=Objective(), own_samples=0, max_length=64, held_out=0.0, seed=0, max_rejected=None
    )
    with pytest.raises(RecordError, match=r"records\.jsonl: was changed while it was read"):
        load_dataset(RecordsFile(path, earlier), model, config, Console(quiet=True))
    assert not list(tmp_path.rglob("*.arrow"))


def test_dropped_and_truncated_records_are_counted(base: Path, rejections: Path, tmp_path: Path) -> None:
    records = tmp_path / "mixed.jsonl"
    lines = rejections.read_text().splitlines()
    tokenizer = tiny_tokenizer()
    write_records(tmp_path / "odd.jsonl", [make_record("Hm", [""]), make_record("a " * 200, ["No"])])
    long = "talk it through " * 30
    write_records(tmp_path / "long.jsonl", [make_record("Hi", [long, "No"])])
    records.write_text(
        "\n".join([*lines, (tmp_path / "odd.jsonl").read_text() + (tmp_path / "long.jsonl").read_text()])
    )
    assert len(tokenizer(long).input_ids) > 64
    report = start(base, records, tmp_path / "run", max_length=64, held_out=0, max_steps=2)
    expected = {"read": 13, "dropped": 2, "truncated_responses": 1, "no_room": 1, "nothing_rejected": 1}
    assert report.data == expected
    assert (report.records, report.records_held_out) == (11, 0)


def test_bad_lines_can_be_skipped(base: Path, rejections: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rejections.read_text() + "{\n")
    assert start(base, broken, tmp_path / "run", max_steps=2, skip_bad=True).data["read"] == 10


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 9))
def test_a_split_has_every_record_once(count: int, share: float, seed: int) -> None:
    training, held_out = split_records(count, share, seed)
    assert sorted([*training, *held_out]) == list(range(count))
    assert len(held_out) == min(int(count * share), count - 1)
    for part, again in zip((training, held_out), split_records(count, share, seed), strict=True):
        assert part.tolist() == again.tolist() == sorted(part)


def test_no_sample_is_drawn_for_a_prompt_that_is_too_long(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_prompts: list[str] = []

    def draw(records: list[RejectionRecord], *_: Any) -> list[RejectionRecord]:
        sampled_prompts.extend(str(record.prompt) for record in records)
        return [make_record(record.prompt, ["No.", "Sleep well."], [1, 0], 1) for record in records]

    monkeypatch.setattr(dataset, "add_own_samples", draw)
    file = tmp_path / "records.jsonl"
    write_records(file, [make_record(prompt, ["No."], [1], 1) for prompt in ("Hi", "long " * 200, "Tip?")])
    run = tmp_path / "run"
    report = start(base, file, run, objective="listwise", held_out=0.0, max_length=64, max_steps=2)
    assert sampled_prompts == ["Hi", "Tip?"]
    assert report.records == 2


def test_a_refusal_of_the_chat_template_names_the_line(base: Path, tmp_path: Path) -> None:
    strict = tmp_path / "base"
    shutil.copytree(base, strict)
    template = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML
    (strict / "chat_template.jinja").write_text(template)
    file = tmp_path / "records.jsonl"
    prompts = ("Hi", (("user", "Hi"), ("assistant", "Yes?"), ("user", "Tip?")), "Tip?")
    write_records(file, [make_record(as_messages(prompt), ["No."]) for prompt in prompts])
    with pytest.raises(RecordError, match=r"records.jsonl:2: .* refuses it: one message only; .* --skip-bad"):
        start(strict, file, tmp_path / "run", max_steps=1)
    report = start(strict, file, tmp_path / "run", max_steps=2, skip_bad=True, held_out=0.0)
    assert report.data == {"read": 3, "dropped": 1, "truncated_responses": 0, "refused_by_template": 1}


def test_empty_answers_are_named_as_what_is_wrong(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    write_records(file, [make_record("Hi", [""]), make_record("Tip?", ["<|im_end|>"])])
    with pytest.raises(RecordError, match="every answer is empty"):
        start(base, file, tmp_path / "run", max_steps=1)


def test_what_was_noticed_in_the_text_is_said_and_reported(base: Path, rejections: Path, tmp_path: Path) -> None:
    clean, marked = (
        load_dataset(
            RecordsFile(file, records_sha256(file)),
            open_model(str(base)),
            BuleyeanConfig(output_dir=str(tmp_path), max_length=64),
            Console(quiet=True),
        )
        for file in (rejections, _with_end_marks(rejections, tmp_path / "marked.jsonl"))
    )
    assert list(marked.training) == list(clean.training)
    assert marked.counts["end_marks"] > 0
    assert "end-of-turn tokens" in marked.describe()
    assert "end-of-turn tokens" not in clean.describe()


def _with_end_marks(source: Path, target: Path) -> Path:
    records = (
        replace(record, rejected_responses=tuple(f"{text}<|im_end|>\n" for text in record.rejected_responses))
        for record in read_records(source)
    )
    write_records(target, records)
    return target
