"""Boundaries on disk are the boundaries in memory; the same data is tokenised once; what is old goes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data import token_store as tokenised
from buleyean_rl.data.records import RejectionRecord, make_record
from buleyean_rl.data.token_store import BoundaryFile, tokenise, write_boundaries
from buleyean_rl.data.trie import Boundary, build_boundaries, build_boundary
from buleyean_rl.errors import RecordError
from tiny import SENTENCES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MOST = 2**31 - 1

ids = st.lists(st.integers(0, MOST), max_size=5)
boundaries = st.builds(
    Boundary,
    prompt=ids,
    tokens=ids,
    runs=ids,
    parents=ids,
    rejections=st.lists(st.tuples(st.integers(0, MOST), st.integers(0, MOST), st.integers(1, 9 * MOST)), max_size=5),
    rounds=st.integers(1, 9 * MOST),
    truncated=st.integers(0, 99),
    ends=ids,
    counts=st.lists(st.integers(0, 9 * MOST), max_size=5),
)
batches = st.lists(st.lists(st.none() | boundaries, max_size=4), max_size=5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns where in it the tokens go."""
    monkeypatch.setattr(tokenised, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tokens"


def some_records(count: int = 20) -> list[RejectionRecord]:
    answers = ["", "talk it through " * 30, *SENTENCES]
    return [
        make_record(f"Tip {n}?", [answers[n % 10], answers[-1][: n + 1]], [n + 1, 2], 60, [[], [[0, 1]]])
        for n in range(count - 1)
    ] + [make_record("too long " * 100, ["No"])]


def counted(records: list[RejectionRecord], read: list[RejectionRecord]) -> Iterator[RejectionRecord]:
    for record in records:
        read.append(record)
        yield record


# --- the file


@given(batches)
def test_what_is_read_is_what_was_written(drawn: list[list[Boundary | None]]) -> None:
    kept = [one for batch in drawn for one in batch if one is not None]
    with tempfile.TemporaryDirectory() as place:
        write_boundaries(Path(place) / "file", drawn)
        file = BoundaryFile(Path(place) / "file")
        assert list(file) == kept
        assert [one.index for one in file] == list(range(len(kept)))
        assert file.nodes.tolist() == [one.nodes for one in kept]
        assert file.sizes.tolist() == [len(one.prompt) + len(one.tokens) for one in kept]
        assert file.data == {
            "read": sum(map(len, drawn)),
            "dropped": sum(map(len, drawn)) - len(kept),
            "truncated_responses": sum(one.truncated for one in kept),
        }


def test_what_is_read_holds_plain_integers() -> None:
    first = tokenise(some_records(), "some", TOKENIZER, 64)[0]
    numbers = [*first.prompt, *first.tokens, *first.runs, *first.parents, first.rounds, first.truncated, first.index]
    assert {type(number) for number in [*numbers, *(part for entry in first.rejections for part in entry)]} == {int}


@given(batches, st.data())
def test_a_selection_keeps_numbers_and_sizes(drawn: list[list[Boundary | None]], data: st.DataObject) -> None:
    kept = [one for batch in drawn for one in batch if one is not None]
    places = data.draw(st.lists(st.sampled_from(range(len(kept))))) if kept else []
    with tempfile.TemporaryDirectory() as place:
        write_boundaries(Path(place) / "file", drawn)
        selection = BoundaryFile(Path(place) / "file").select(np.array(places, dtype=int))
        assert [one.index for one in selection] == places
        assert selection[:] == [kept[place] for place in places]
        assert selection.sizes.tolist() == [len(one.prompt) + len(one.tokens) for one in selection]
        assert selection.nodes.tolist() == [one.nodes for one in selection]
        again = selection.select(np.arange(len(places))[::-1])
        assert [one.index for one in again] == places[::-1]
        assert again[1:3] == selection[::-1][1:3]


def test_places_are_those_of_a_list() -> None:
    file = tokenise(some_records(), "some", TOKENIZER, 64)
    assert file[-1] == list(file)[-1]
    assert file[-1].index == len(file) - 1
    with pytest.raises(IndexError):
        file[len(file)]


def test_the_number_is_no_part_of_what_a_boundary_is() -> None:
    assert Boundary([1], [2], [0], [0], [(0, 2, 1)], 1, index=7) == Boundary([1], [2], [0], [0], [(0, 2, 1)], 1)


# --- tokenising


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_boundaries_do_not_depend_on_their_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "BATCH", batch)
    records, told = some_records(), []
    file = tokenise(iter(records), "some", TOKENIZER, 64, progress=told.append)
    alone = [build_boundary(record, TOKENIZER, 64) for record in records]
    assert list(file) == [one for one in alone if one is not None]
    assert file.data == {"read": 20, "dropped": alone.count(None), "truncated_responses": 2}
    assert alone.count(None) > 0
    assert told == [*range(batch, 20, batch), 20]
    assert build_boundaries(records, TOKENIZER, 64) == alone


def test_no_more_records_are_held_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "BATCH", 4)
    read: list[RejectionRecord] = []
    waiting: list[int] = []
    tokenise(
        counted(some_records(), read), "some", TOKENIZER, 64, progress=lambda done: waiting.append(len(read) - done)
    )
    assert max(waiting) == 0


def test_records_that_are_all_dropped_make_an_empty_file() -> None:
    for _ in range(2):
        file = tokenise([make_record("Hi", [""])], "empty", TOKENIZER, 64)
        assert (len(file), list(file), file.data["dropped"]) == (0, [], 1)


# --- the cache


def test_the_same_data_is_tokenised_once() -> None:
    read: list[RejectionRecord] = []
    first = tokenise(counted(some_records(), read), "some", TOKENIZER, 64)
    assert len(read) == 20
    second = tokenise(counted(some_records(), read), "some", tiny_tokenizer(), 64)
    assert len(read) == 20
    assert list(second) == list(first)
    assert second.data == first.data


def other_template() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def other_split() -> Any:
    return tiny_tokenizer("gpt-2")


def added_token() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Tip"])
    return tokenizer


@pytest.mark.parametrize("other", [other_template, other_split, added_token])
def test_another_tokenizer_tokenises_again(other: Any) -> None:
    first = tokenise(some_records(), "some", TOKENIZER, 64)
    second = tokenise(some_records(), "some", other(), 64)
    assert list(second) == [one for one in build_boundaries(some_records(), other(), 64) if one is not None]
    assert list(second) != list(first)


def test_other_data_another_length_or_other_code_tokenise_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RejectionRecord] = []

    def again(source: str, length: int) -> int:
        read.clear()
        tokenise(counted(some_records(), read), source, TOKENIZER, length)
        return len(read)

    assert [again("some", 64), again("other", 64), again("some", 32), again("some", 64)] == [20, 20, 20, 0]
    monkeypatch.setattr(tokenised, "version", lambda _: "next")
    assert again("some", 64) == 20


def test_a_failure_leaves_nothing_and_the_next_run_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "BATCH", 4)

    def failing() -> Iterator[RejectionRecord]:
        yield from some_records()
        raise RecordError("enough")

    with pytest.raises(RecordError, match="enough"):
        tokenise(failing(), "some", TOKENIZER, 64)
    assert list(folder.iterdir()) == []
    assert tokenise(some_records(), "some", TOKENIZER, 64).data["read"] == 20


@pytest.mark.parametrize("length", [0, 10, -10])
def test_a_spoilt_file_is_made_again(length: int, folder: Path) -> None:
    tokenise(some_records(), "some", TOKENIZER, 64)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:length])
    assert tokenise(some_records(), "some", TOKENIZER, 64).data["read"] == 20


def test_what_was_used_longest_ago_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        tokenise(some_records(), name, TOKENIZER, 64)
    paths = {name: folder / f"{tokenised._key(name, TOKENIZER, 64)}.arrow" for name in "abcd"}
    size = paths["a"].stat().st_size
    for age, name in enumerate("cba"):
        os.utime(paths[name], (time.time() - 100 - age,) * 2)
    open_before = tokenise([], "a", TOKENIZER, 64)  # now the last one used
    b = BoundaryFile(paths["b"])
    monkeypatch.setattr(tokenised, "KEPT_BYTES", int(3.5 * size))
    tokenise(some_records(), "d", TOKENIZER, 64)
    assert {name for name, path in paths.items() if path.exists()} == {"a", "c", "d"}
    assert list(b) == list(open_before)  # who has it open can go on

    monkeypatch.setattr(tokenised, "KEPT_BYTES", 0)
    tokenise(some_records(), "b", TOKENIZER, 64)
    assert list(folder.iterdir()) == [paths["b"]], "what is in use stays, however large"


def test_only_old_unfinished_files_go(folder: Path) -> None:
    tokenise(some_records(), "a", TOKENIZER, 64)
    old, new = folder / "old.1.tmp", folder / "new.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 2 * tokenised.LEFTOVER_SECONDS,) * 2)
    tokenise(some_records(), "b", TOKENIZER, 64)
    assert not old.exists()
    assert new.exists()
