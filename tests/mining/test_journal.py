"""A journal: ours is read, anybody else's file is left alone."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.mining.journal import Journal

HEADER = {"model": "m", "prompts": "p"}


@pytest.mark.parametrize(
    "content", ['{"model": "m"}\n', "theirs", '{"half": ', "[]\n", "\n\n", "\0\1", '{"format": 3}\n']
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"j.jsonl is there already and is no journal of ours: move it away"):
            Journal(path, HEADER, overwrite=overwrite)
    assert path.read_text() == content


def test_a_journal_that_is_old_damaged_or_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, HEADER), pytest.raises(UsageError, match="is in use by another process"):
        Journal(path, HEADER)
    assert json.loads(path.read_text()) == {"format": 3, **HEADER}
    head = path.read_text()
    for content, error, problem in (
        (
            head.replace("3", "2") + "{}\n",
            UsageError,
            "is a journal of an earlier version, format 2: name another output",
        ),
        (head + '{"prompt": 0, "answ\n', RecordError, r"j.jsonl:2: is not valid JSON.*; name another output"),
        (head + '{"prompt": 0, "sample": 0, "answer": 7}\n', RecordError, "j.jsonl:2: is no line of a journal"),
        (head + '{"prompt": [], "sample": 0, "cause": "", "detail": ""}\n', RecordError, "j.jsonl:2: is no line"),
        (head + "[]\n", RecordError, "j.jsonl:2: is no line"),
    ):
        path.write_text(content)
        with pytest.raises(error, match=problem):
            Journal(path, HEADER)
        assert path.read_text() == content
        with Journal(path, HEADER, overwrite=True):
            assert path.read_text() == head


def test_a_header_without_answers_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    for seed in (1, 2):
        with Journal(path, {**HEADER, "seed": seed}):
            assert json.loads(path.read_text())["seed"] == seed


def test_a_disk_that_is_full_until_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "j.jsonl"
    journal = Journal(path, {})
    journal._file.close()
    monkeypatch.setattr(journal, "_file", Full())
    with pytest.raises(OSError, match="No space left") as error, journal:
        pass
    assert error.value.filename == str(path)
