"""Files and folders that are written whole or not at all.

    a unique name in the same folder --write, fsync--> rename --> the name that was asked for

A link is followed, so that what it points to is replaced and the link stays. Killed in the middle, a process leaves a
file that ends in `.tmp`; its name says whose it was, and `sweep_temporary` deletes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from buleyean_rl.system.disk import name_full_disk

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
        with name_full_disk(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody asked for
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
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
    """Write a UTF-8 text file, whole or not at all; what of a path in it is no UTF-8 becomes question marks."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))


def encode_json(value: Mapping[str, Any], *, allow_nan: bool = True) -> bytes:
    """JSON for people to read, in UTF-8; what of a path in it is no UTF-8 is escaped, and read back as it was.

    Args:
        value: that JSON can hold.
        allow_nan: write NaN and infinity, which JSON does not have, instead of raising ValueError.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    return f"{text}\n".encode(errors="backslashreplace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(encode_json(value))


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        with name_full_disk(path):
            yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder at once: what a process that is killed meanwhile leaves of it, `sweep_temporary` deletes."""
    temporary = _temporary_name(path)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder for what a file is made from, deleted at the end.

    Args:
        target: the file; the folder is made beside it.
    """
    folder = _temporary_name(target)
    folder.mkdir()
    try:
        with name_full_disk(target):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of an unfinished file or folder of ours."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep_temporary(folder: Path, name: str | None = None) -> None:
    """Delete the unfinished files and folders that killed processes left in a folder.

    Those of processes of this machine that have ended; of other machines and containers, which may share the folder,
    and of earlier versions, those that are a day old.

    Args:
        folder: which may not exist.
        name: of a file: sweep only what was to become it.
    """
    start = "" if name is None else f".{name[:60]}."
    for path in folder.glob(f".*{SUFFIX}"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not path.name.startswith(start):
            continue
        with suppress(OSError):  # another process was faster
            is_local = match["machine"] == _machine()
            if is_local and psutil.pid_exists(int(match["pid"])):
                continue
            if is_local or path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


_TEMPORARY = re.compile(rf"\..*\.(?:(?P<machine>[0-9a-f]{{6}})-)?(?P<pid>\d+)-[0-9a-f]{{8}}{re.escape(SUFFIX)}")


def _temporary_name(target: Path) -> Path:
    # names have at most 255 bytes
    return target.with_name(f".{target.name[:60]}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")


@cache
def _machine() -> str:
    """What process ids are counted in: the machine, or a container on it."""
    namespace = Path("/proc/self/ns/pid")
    name = f"{platform.node()} {os.readlink(namespace) if namespace.is_symlink() else ''}"
    return hashlib.sha256(name.encode()).hexdigest()[:6]
