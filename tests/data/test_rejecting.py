"""A rejection more in a records file, and the part of an answer that somebody means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from buleyean_rl.data.records import make_record, read_records, write_records
from buleyean_rl.data.records.rejecting import append_record, find_part
from buleyean_rl.errors import UsageError

FIRST = make_record("p", ["No."])
SECOND = make_record("q", ["Wrong words."], spans=[[[0, 5]]], token_ids=[[7, 8]], tokenizer="ab", ended=[True])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("is round", "is round"),
        ("IS  Round", "is round"),
        ("the earth", "The **earth"),
        ("one two", "one\n- two"),
        ("flat", None),
        ("", None),
        ("a.c", None),
    ],
)
def test_words_are_found_as_they_are_read(words: str, part: str | None) -> None:
    text = "The **earth** is round.\n- one\n- two abc"
    span = find_part(text, words)
    assert (None if span is None else text[slice(*span)]) == part


def test_lines_are_added_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append_record(path, FIRST)
    append_record(path, SECOND, 'too "rude"')
    assert list(read_records(path)) == [FIRST, SECOND]
    assert json.loads(path.read_text().splitlines()[1])["remark"] == 'too "rude"'
    path.write_text(path.read_text().rstrip("\n"))  # an editor left out the last line end
    append_record(path, FIRST)
    assert list(read_records(path)) == [FIRST, SECOND, FIRST]


@pytest.mark.parametrize("content", ["my notes\n", '{"key": 1}\n', "\0\1"])
def test_a_file_that_is_no_records_file_stays_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no records file, and stays as it is"):
        append_record(path, FIRST)
    assert path.read_text() == content
    for place in (tmp_path, Path("/dev/null"), tmp_path / "none" / "r"):
        with pytest.raises(UsageError):
            append_record(place, FIRST)


def test_a_line_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [FIRST])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        append_record(path, SECOND)
    assert list(read_records(path)) == [FIRST]
