"""A lock is one process's at a time, and its own errors are told apart from others."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from buleyean_rl.errors import UsageError
from buleyean_rl.system import locks
from buleyean_rl.system.locks import FileLock, check_unlocked, is_lock


def test_the_second_is_told_and_the_next_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with FileLock(path):
        assert path.read_text() == f"buleyean-rl {os.getpid()}\n"
        with pytest.raises(UsageError, match=f"is in use by process {os.getpid()}"), FileLock(path):
            pass
        with pytest.raises(UsageError, match=f"is in use by process {os.getpid()}"):
            check_unlocked(path)
    assert not path.exists()
    check_unlocked(path)
    with FileLock(path):
        pass


def test_a_lock_file_that_its_holder_deletes_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    lock, deleted = locks._lock, []

    def lock_after_the_holder_left(file: BinaryIO, name: Path, **options: bool) -> bool:
        if not deleted:
            deleted.append(name)
            name.unlink()
        return lock(file, name, **options)

    monkeypatch.setattr(locks, "_lock", lock_after_the_holder_left)
    with FileLock(path):
        assert path.read_text() == f"buleyean-rl {os.getpid()}\n"


@pytest.mark.parametrize("content", ["held by a backup\n", "buleyean-rl 12\n34\n"])
def test_a_lock_of_another_program_stays_as_it_is(tmp_path: Path, content: str) -> None:
    (path := tmp_path / ".lock").write_text(content)
    with pytest.raises(UsageError, match="is another program's lock"), FileLock(path):
        pass
    assert path.read_text() == content
    assert not is_lock(path)


@pytest.mark.parametrize("content", ["", "12\n", "buleyean-rl 12\n"])
def test_a_lock_that_a_killed_process_left_is_taken(tmp_path: Path, content: str) -> None:
    (path := tmp_path / ".lock").write_text(content)
    with FileLock(path):
        assert is_lock(path)
    assert not path.exists()


def test_an_error_that_is_no_lock_is_reported_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="cannot be locked: No locks available"), FileLock(tmp_path / ".lock"):
        pass


def test_where_the_system_has_no_locks_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with FileLock(tmp_path / ".lock"), FileLock(tmp_path / ".lock"):
        pass


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "getpid", fail)  # while the lock is written
    with pytest.raises(OSError, match="No space left") as error, FileLock(tmp_path / ".lock"):
        pass
    assert error.value.filename == str(tmp_path / ".lock")
