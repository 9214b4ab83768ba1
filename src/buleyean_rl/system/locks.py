"""Locks between processes, by the operating system: a lock ends with the process that holds it, however it ends."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from buleyean_rl.errors import UsageError
from buleyean_rl.system.disk import name_full_disk

try:
    import fcntl
except ImportError:  # Windows, where two processes on one file are not told apart
    fcntl = None  # type: ignore[assignment]

_CONTENT = re.compile(rb"buleyean-rl (\d+)\n")
_TAKEABLE = re.compile(rb"(buleyean-rl )?\d+\n|")  # of an earlier version, or killed before it could write


def lock_file(file: BinaryIO, path: Path) -> None:
    """Lock an open file until it is closed.

    Args:
        file: open for writing.
        path: its name, for the message.

    Raises:
        UsageError: another process has it.
        OSError: it cannot be locked for another reason, such as a network file system without locks.
    """
    if not _lock(file, path):
        raise UsageError(f"{path} is in use by another process: wait for it, or stop it")


class FileLock:
    """Holds a lock file as long as the context lasts.

    Args:
        path: the lock file; it is created, says which process holds it, and is deleted at the end.
        wait: until another process that holds it is done.

    Raises:
        UsageError: another process holds it, which is named; or it is another program's, and stays as it is.
        OSError: it cannot be created or locked.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self.path, self._wait = path, wait
        self._file: BinaryIO | None = None

    def __enter__(self) -> FileLock:
        while self._file is None:
            file = self.path.open("a+b")
            try:
                if not _lock(file, self.path, wait=self._wait):
                    raise _in_use(file, self.path.parent)
                if _is_still(file, self.path):  # otherwise its holder deleted it between the two steps above
                    if not _TAKEABLE.fullmatch(_read(file)):
                        raise UsageError(f"{self.path} is another program's lock: name another folder")
                    with name_full_disk(self.path):
                        file.truncate(0)
                        file.write(f"buleyean-rl {os.getpid()}\n".encode())
                        file.flush()
                    self._file = file
            finally:
                if self._file is None:
                    file.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            if fcntl is not None:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_lock(path: Path) -> bool:
    """Whether a file is a `FileLock`'s, held or left by a killed process."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _CONTENT.fullmatch(_read(file)) is not None


def check_unlocked(path: Path) -> None:
    """Refuse a lock file that another process holds.

    Args:
        path: of a `FileLock`; it may not exist, and is not changed.

    Raises:
        UsageError: it is held.
    """
    if path.is_file():
        with path.open("rb") as file:
            if not _lock(file, path):
                raise _in_use(file, path.parent)


def _in_use(file: BinaryIO, folder: Path) -> UsageError:
    holder = _CONTENT.fullmatch(_read(file))
    process = f"process {holder[1].decode()}" if holder else "another process"
    return UsageError(f"{folder} is in use by {process}: wait for it, or stop it")


def _read(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(64)


def _lock(file: BinaryIO, path: Path, *, wait: bool = False) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error
    return True


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return fcntl is None or os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
