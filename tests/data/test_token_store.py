"""Boundaries on disk are the boundaries in memory; the same data is tokenised once; the least recently used goes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data import token_batches, token_store
from buleyean_rl.data.chat_template import TemplateRefusal
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import RejectionRecord, as_messages, make_record
from buleyean_rl.data.token_store import BoundaryFile, tokenise, write_boundaries
from buleyean_rl.data.trie import Boundary, Judgement, build_boundaries, build_boundary
from buleyean_rl.errors import RecordError
from buleyean_rl.system.cache import entry_bytes
from tiny import SENTENCES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MOST = 2**31 - 1

small, large = st.integers(0, MOST), st.integers(0, 9 * MOST)
ids = st.lists(small, max_size=5)
drawn_boundaries = st.builds(
    Boundary,
    prompt=ids,
    tokens=ids,
    runs=ids,
    parents=ids,
    judgements=st.lists(st.builds(Judgement, small, small, large, large, large), max_size=5),
    truncated=st.integers(0, 99),
    ends=ids,
    counts=st.lists(large, max_size=5),
    rounds=st.lists(large, max_size=5),
)
boundaries = drawn_boundaries.map(lambda drawn: replace(drawn, counts=(drawn.counts * 6 or [0] * 6)[: len(drawn.ends)]))
batches = st.lists(st.lists(st.none() | boundaries, max_size=4), max_size=5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns where in it the tokens go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "buleyean-rl" / "tokens"


def some_records(count: int = 20) -> list[RejectionRecord]:
    answers = ["", "talk it through " * 30, *SENTENCES]
    return [
        make_record(f"Tip {n}?", [answers[n % 10], answers[-1][: n + 1]], [n + 1, 2], 60, [[], [[0, 1]]])
        for n in range(count - 1)
    ] + [make_record("too long " * 100, ["No"])]


def recorded(records: list[RejectionRecord], read: list[RejectionRecord]) -> Iterator[RejectionRecord]:
    for record in records:
        read.append(record)
        yield record


# --- the file


@given(batches, st.data())
def test_what_is_read_is_what_was_written(drawn: list[list[Boundary | None]], data: st.DataObject) -> None:
    written = [boundary for batch in drawn for boundary in batch if boundary is not None]
    indices = data.draw(st.lists(st.sampled_from(range(len(written))))) if written else []
    with tempfile.TemporaryDirectory() as place:
        write_boundaries(Path(place) / "file", drawn)
        file = BoundaryFile(Path(place) / "file")
        assert list(file) == written
        assert [boundary.index for boundary in file] == list(range(len(written)))
        assert file.nodes.tolist() == [boundary.nodes for boundary in written]
        assert file.sizes.tolist() == [boundary.size for boundary in written]
        assert file.data == {
            "read": sum(map(len, drawn)),
            "dropped": sum(map(len, drawn)) - len(written),
            "truncated_responses": sum(boundary.truncated for boundary in written),
        }
        selection = file.select(np.array(indices, dtype=int))
        assert [boundary.index for boundary in selection] == indices
        assert selection[:] == [written[index] for index in indices]
        assert selection.sizes.tolist() == [boundary.size for boundary in selection]
        assert selection.nodes.tolist() == [boundary.nodes for boundary in selection]
        reversed_selection = selection.select(np.arange(len(indices))[::-1])
        assert [boundary.index for boundary in reversed_selection] == indices[::-1]
        assert reversed_selection[1:3] == selection[::-1][1:3]


def test_what_is_read_holds_plain_integers() -> None:
    first = tokenise(some_records(), "some", TOKENIZER, 64)[0]
    numbers = [*first.prompt, *first.tokens, *first.runs, *first.parents, *first.rounds, first.truncated, first.index]
    assert {type(number) for number in [*numbers, *(part for entry in first.judgements for part in entry)]} == {int}


def test_indices_are_those_of_a_list() -> None:
    file = tokenise(some_records(), "some", TOKENIZER, 64)
    assert file[-1] == list(file)[-1]
    assert file[-1].index == len(file) - 1
    with pytest.raises(IndexError):
        file[len(file)]


def test_two_boundaries_are_equal_whatever_their_index() -> None:
    assert Boundary([1], [2], [0], [0], [], index=7) == Boundary([1], [2], [0], [0], [])


# --- tokenising


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_boundaries_do_not_depend_on_their_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_RECORDS", batch)
    records, read, told = some_records(), [], []

    def note(done: int) -> None:
        told.append(done)
        assert len(read) == done, "more records are in memory than a batch"

    file = tokenise(recorded(records, read), "some", TOKENIZER, 64, progress=note)
    alone = [build_boundary(record, TOKENIZER, 64) for record in records]
    assert list(file) == [boundary for boundary in alone if boundary is not None]
    assert file.data == {"read": 20, "dropped": alone.count(None), "truncated_responses": 2, "no_room": 1}
    assert alone.count(None) > 0
    assert told == [*range(batch, 20, batch), 20]
    assert build_boundaries(records, Encoder(TOKENIZER, 64)) == alone


def test_other_processes_give_the_same_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes; their batches come in order, with what their encoders counted, and so does a refusal."""
    monkeypatch.setattr(token_store, "BATCH_RECORDS", 2)
    alone = tokenise(some_records(), "some", TOKENIZER, 64)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(token_batches, "LOCAL_BATCHES", 1)
    monkeypatch.setattr(token_batches, "available_cores", lambda: 2)
    (tmp_path / "queue.py").write_text("raise SystemExit")  # somebody's file, of a name that Python has too
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    together = tokenise(some_records(), "some", TOKENIZER, 64)
    assert (list(together), together.data) == (list(alone), alone.data)
    assert path.read_bytes() == content
    system_last = make_record([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], ["c"])
    refusing = tiny_tokenizer()
    refusing.chat_template = "{% if messages|length > 1 %}{{ raise_exception('only one') }}{% endif %}" + str(
        refusing.chat_template
    )
    with pytest.raises(TemplateRefusal, match="only one") as caught:
        tokenise([*some_records(), system_last], "refused", refusing, 64)
    assert caught.value.messages == as_messages(system_last.prompt)
    assert list(folder.iterdir()) == [path]


def test_records_that_are_all_dropped_make_an_empty_file() -> None:
    for _ in range(2):
        file = tokenise([make_record("Hi", [""])], "empty", TOKENIZER, 64)
        assert (len(file), list(file), file.data["dropped"]) == (0, [], 1)


# --- the cache


def test_the_same_data_is_tokenised_once() -> None:
    read: list[RejectionRecord] = []
    first = tokenise(recorded(some_records(), read), "some", TOKENIZER, 64)
    assert len(read) == 20
    second = tokenise(recorded(some_records(), read), "some", tiny_tokenizer(), 64)
    assert len(read) == 20
    assert list(second) == list(first)
    assert second.data == first.data


def test_another_tokenizer_tokenises_again() -> None:
    other_template, added_token = tiny_tokenizer(), tiny_tokenizer()
    other_template.chat_template = "{{ messages[0]['content'] }}"
    added_token.add_tokens(["Tip"])
    first = tokenise(some_records(), "some", TOKENIZER, 64)
    for other in (other_template, added_token, tiny_tokenizer("gpt-2")):
        second = tokenise(some_records(), "some", other, 64)
        built = build_boundaries(some_records(), Encoder(other, 64))
        assert list(second) == [boundary for boundary in built if boundary is not None]
        assert list(second) != list(first)


def test_other_data_another_length_or_other_code_tokenise_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[RejectionRecord] = []

    def again(source: str, length: int, max_rejected: int | None = None) -> int:
        read.clear()
        tokenise(recorded(some_records(), read), source, TOKENIZER, length, max_rejected=max_rejected)
        return len(read)

    assert [again("some", 64), again("other", 64), again("some", 32), again("some", 64)] == [20, 20, 20, 0]
    assert [again("some", 64, 3), again("some", 64, 3)] == [20, 0]
    for module in ("token_store.py", "records/messages.py", "records/values.py"):
        monkeypatch.setattr(token_store, "_DATA", code := shutil.copytree(token_store._DATA, tmp_path / module))
        assert again("some", 64) == 0
        with (code / module).open("a") as file:
            file.write("# changed")
        assert again("some", 64) == 20
    for library in ("buleyean-rl", "transformers", "tokenizers", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr(token_store, "version", lambda name, library=library: "next" if name == library else "now")
            assert again("some", 64) == 20


def test_a_failure_leaves_nothing_and_the_next_run_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BATCH_RECORDS", 4)

    def failing() -> Iterator[RejectionRecord]:
        yield from some_records()
        raise RecordError("enough")

    with pytest.raises(RecordError, match="enough"):
        tokenise(failing(), "some", TOKENIZER, 64)
    assert list(folder.iterdir()) == []
    assert tokenise(some_records(), "some", TOKENIZER, 64).data["read"] == 20


def test_a_damaged_file_is_written_again(folder: Path) -> None:
    tokenise(some_records(), "some", TOKENIZER, 64)
    (path,) = folder.iterdir()
    for length in (0, 10, -10):
        path.write_bytes(path.read_bytes()[:length])
        assert tokenise(some_records(), "some", TOKENIZER, 64).data["read"] == 20


def test_what_was_used_longest_ago_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        tokenise(some_records(), name, TOKENIZER, 64)
    paths = {name: folder / f"{token_store._store_key(name, TOKENIZER, 64)}.arrow" for name in "abcd"}
    size = entry_bytes(paths["a"])
    for age, name in enumerate("cba"):
        os.utime(paths[name], (time.time() - 100 - age,) * 2)
    open_before = tokenise([], "a", TOKENIZER, 64)  # now the last one used
    b = BoundaryFile(paths["b"])
    monkeypatch.setattr(token_store, "CACHE_BYTES", int(3.5 * size))
    tokenise(some_records(), "d", TOKENIZER, 64)
    assert {name for name, path in paths.items() if path.exists()} == {"a", "c", "d"}
    assert list(b) == list(open_before)  # who has it open can go on

    monkeypatch.setattr(token_store, "CACHE_BYTES", 0)
    tokenise(some_records(), "b", TOKENIZER, 64)
    assert list(folder.iterdir()) == [paths["b"]], "what is in use stays, however large"
