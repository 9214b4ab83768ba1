"""Results kept on disk between runs, keyed by all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.system.disk import FULL_DISK
from buleyean_rl.system.files import SUFFIX, read_json_object, sweep_temporary, write_json
from buleyean_rl.system.outputs import check_utf8


def cache_folder() -> Path:
    """`buleyean-rl` in the user's cache: converted models, kernels, token stores, answers.

    XDG_CACHE_HOME must be absolute, as its specification has it: a cache does not belong in whatever folder is current.
    Without a home that can be written, as in some containers, it is the user's folder among the temporary files.

    Raises:
        UsageError: there is no such folder either.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():
        return configured / "buleyean-rl"
    try:
        folder = Path.home() / ".cache" / "buleyean-rl"
    except RuntimeError:  # as for a container's user without a name
        return _temporary_cache()
    # `Path.exists` raises where nobody may look
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) else _temporary_cache()


def _temporary_cache() -> Path:
    """A folder that is there, the user's, and closed to others: kernels are loaded from it."""
    user = os.getuid() if hasattr(os, "getuid") else None  # on Windows the folder itself is the user's
    folder = Path(tempfile.gettempdir()) / ("buleyean-rl" if user is None else f"buleyean-rl-{user}")
    remedy = "set HOME or XDG_CACHE_HOME to a folder that you may write to"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UsageError(f"the cache {folder} cannot be made: {error.strerror}: {remedy}") from error
    is_shared = user is not None and (status.st_uid != user or status.st_mode & 0o077)
    if not stat.S_ISDIR(status.st_mode) or is_shared:
        raise UsageError(f"the cache {folder} is not yours alone: {remedy}")
    _say_once(f"no home folder that can be written: the cache is {folder}; XDG_CACHE_HOME moves it")
    return folder


@lru_cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def make_cache_folder(name: str) -> Path:
    """A folder in the cache, made if it is not there.

    Args:
        name: of the folder.

    Raises:
        UsageError: nothing can be written there.
        OSError: the disk is full.
    """
    folder = cache_folder() / name
    remedy = "set XDG_CACHE_HOME to a folder that you may write to"
    check_utf8(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"the cache {folder} cannot be made: {error.strerror}: {remedy}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the cache {folder} is read-only to you: {remedy}")
    return folder


def cache_key(inputs: object) -> str:
    """A short hash for a file's name.

    Args:
        inputs: all that decides the result, such that JSON can hold it.
    """
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def memoize_to_disk(kind: str, inputs: object, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result computed once: read from disk if it was computed from the same inputs before.

    Args:
        kind: what it is, for the name of its file.
        inputs: see `cache_key`.
        compute: returns the result, such that JSON can hold it.
    """
    file = cache_folder() / f"{kind}-{cache_key(inputs)}.json"
    if (earlier := read_json_object(file)) is not None:  # otherwise missing or damaged
        return earlier
    result = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
    except OSError as error:
        print(f"{file.parent}: {error.strerror}: the next run computes {kind} again", file=sys.stderr)
    return result


def sweep_cache() -> None:
    """Delete what killed processes left unfinished in the cache: up to the size of a model."""
    with suppress(OSError, UsageError):  # no cache here, or nobody's: whoever needs it says so
        root = cache_folder()
        for folder in (root, *(path for path in root.glob("*") if path.is_dir())):
            sweep_temporary(folder)


def entry_bytes(entry: Path) -> int:
    """Disk that a file, or a folder with all in it, takes."""
    files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
    statuses = (path.stat() for path in files)
    # Windows knows no blocks
    return sum(status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size for status in statuses)


def evict_lru(folder: Path, max_bytes: int) -> None:
    """Delete the least recently used entries of a cache until it is small enough; the newest entry stays.

    What killed processes left unfinished is swept too.

    Args:
        folder: each file or folder in it is one entry, last used when it was last changed or touched.
        max_bytes: of disk that all entries may take together.
    """
    sweep_temporary(folder)
    entries = []
    for entry in folder.glob("*"):
        with suppress(OSError):  # another process deletes too
            if not entry.name.endswith(SUFFIX):
                entries.append((entry.stat().st_mtime_ns, entry))
    total = 0
    for place, (_, entry) in enumerate(sorted(entries, reverse=True)):
        with suppress(OSError):
            total += entry_bytes(entry)
            if total > max_bytes and place > 0:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
