"""A lock is one process's at a time, and its own errors are told apart from others."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from buleyean_rl.errors import UsageError
from buleyean_rl.system import locks
from buleyean_rl.system.locks import FileLock


def test_the_second_is_told_and_the_next_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with FileLock(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(UsageError, match="in use by another process"), FileLock(path):
            pass
    with FileLock(path):
        pass


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
