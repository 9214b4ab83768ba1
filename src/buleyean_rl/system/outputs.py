"""Outputs that the user names: no command deletes, empties or replaces what it did not make.

    a file     check_output_file, before any work --> open_output --> the file, whole or not at all
    a folder   claim_folder: new, empty or ours, and this process's alone

Links are followed. A device or a pipe is written into, never replaced.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from buleyean_rl.errors import UsageError
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import atomic_write, is_temporary, sweep_temporary
from buleyean_rl.system.locks import FileLock, check_unlocked, is_lock

LOCK = ".lock"
_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # its unfinished files


def check_output_file(
    path: Path, *, overwrite: bool = False, is_ours: Callable[[Path], bool] | None = None, streams: bool = True
) -> None:
    """Refuse a file that cannot be written, or that would replace what is not ours. An empty file may be replaced.

    Args:
        path: the file to write.
        overwrite: replace a regular file, whatever it is.
        is_ours: whether a file is of the kind that is about to be written; None: no file is.
        streams: whether what is written can go into a device or a pipe.

    Raises:
        UsageError: says what is there, and what to do.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the file to write")
    if is_stream(path):
        if not streams:
            raise UsageError(f"{path} is not a regular file: name the file to write")
        return
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UsageError(f"{path} is a link that leads back to itself: name another file")
    if not target.parent.is_dir():
        raise UsageError(f"{path} cannot be written: create the folder {target.parent} first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {target.parent} is read-only to you")
    if target.exists() and target.stat().st_size and not overwrite and not (is_ours and is_ours(target)):
        raise UsageError(f"{path} is there already: name another file, or replace it with --overwrite")


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name once all is written; a device or pipe is written into.

    Args:
        path: see `check_output_file`.

    Raises:
        OSError: it cannot be written; names the file.
    """
    if is_stream(path):
        with name_full_disk(path), path.open("ab") as file:
            yield file
    else:
        target = Path(os.path.realpath(path))
        sweep_temporary(target.parent, target.name)
        with atomic_write(path) as file:
            yield file


@contextmanager
def claim_folder(path: Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[None]:
    """Make a folder, or take one that is empty or ours, and hold it for this process while the context lasts.

    Args:
        path: the folder; its parents are made.
        is_ours: whether a folder that is not empty is one that the command made.
        what: it is to hold, such as "run".

    Raises:
        UsageError: it is a file, is not empty and not ours, or another process holds it. Nothing was written.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: name a folder for the {what}")
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a link to nothing: make the folder that it names, or name another")
    if os.path.expanduser(path) != str(path):
        raise UsageError(f"{path} begins with a ~ that the shell left as it is: write the whole path")
    check_utf8(path)
    foreign = UsageError(f"{path} is not empty and has no {what} of ours: name another folder")
    is_new = not path.exists()
    if not is_new and not _may_take(path, is_ours):
        check_unlocked(path / LOCK)
        raise foreign
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / LOCK):
            if not _may_take(path, is_ours):  # another process was faster
                raise foreign
            _sweep(path)
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def check_utf8(path: Path) -> None:
    """Refuse a path that libraries written in other languages cannot open: llama.cpp, tokenizers, Arrow.

    Raises:
        UsageError: it is not UTF-8.
    """
    if str(path).encode(errors="replace") != os.fsencode(path):
        raise UsageError(f"{path} is not UTF-8: choose another name")


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe, a socket or one of this process's open files."""
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True
    return path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()


def _sweep(folder: Path) -> None:
    """Delete what a killed process left unfinished in a folder that is this process's alone."""
    sweep_temporary(folder)
    for path in folder.iterdir():
        if _SAFETENSORS.fullmatch(path.name):
            path.unlink()


def _may_take(folder: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether a folder is ours, or has nothing in it but what a killed process left."""
    leftovers = (is_temporary(path) or (path.name == LOCK and is_lock(path)) for path in folder.iterdir())
    return all(leftovers) or is_ours(folder)
