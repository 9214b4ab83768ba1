"""Files and folders that are written whole or not at all.

    a unique name in the same folder --write, fsync--> rename --> the name that was asked for

A link is followed, so that what it points to is replaced and the link stays. Killed in the middle, a process leaves a
file that ends in `.tmp`, which `sweep_temporary` deletes later.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".tmp"
ABANDONED_SECONDS = 24 * 3600  # nothing is written for longer


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for somebody else to write a file to; it takes the name at the end.

    Args:
        path: the file to write or replace.

    Raises:
        OSError: it cannot be written, or is something other than a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "is not a regular file", str(path))
    temporary = _temporary_name(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # renamed by now, or never created
            temporary.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name once all is written. See `atomic_path`."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file
        file.flush()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes its name at the end, unless another process made one of that name meanwhile.

    Args:
        path: the folder to make; its parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep_temporary(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a folder of ours."""
    for path in folder.glob(f".*{SUFFIX}"):
        with suppress(OSError):  # another process was faster
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary_name(target: Path) -> Path:
    # names have at most 255 bytes
    return target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
