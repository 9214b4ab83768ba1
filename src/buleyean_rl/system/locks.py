"""Locks between processes, by the operating system: a lock ends with the process that holds it, however it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from buleyean_rl.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where two processes on one file are not told apart
    fcntl = None  # type: ignore[assignment]


def lock_file(file: BinaryIO, path: Path) -> None:
    """Lock an open file until it is closed.

    Args:
        file: open for writing.
        path: its name, for the message.

    Raises:
        UsageError: another process has it.
        OSError: it cannot be locked for another reason, such as a network file system without locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{path} is in use by another process: wait for it, or stop it") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error


class FileLock:
    """Holds a lock file as long as the context lasts.

    Args:
        path: the lock file; it is created, says which process holds it, and stays.

    Raises:
        UsageError: another process holds it.
        OSError: it cannot be created or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> FileLock:
        file = self.path.open("a+b")
        try:
            lock_file(file, self.path)
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
