"""Where things are kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buleyean_rl.system.files import write_json


def cache_folder() -> Path:
    """Converted models, kernels and answers: `buleyean-rl` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buleyean-rl"


def key_of(made_from: object) -> str:
    """A name for what is kept.

    Args:
        made_from: all that decides it, such that JSON can hold it.
    """
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def kept(kind: str, made_from: object, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made from the same before; else it is made and kept.

    Args:
        kind: what it is, for the name of its file.
        made_from: see `key_of`.
        make: makes it, such that JSON can hold it.
    """
    file = cache_folder() / f"{kind}-{key_of(made_from)}.json"
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return made


def make_room(folder: Path, most_bytes: int) -> None:
    """Delete what was used longest ago until the rest of a cache is small enough; the newest entry stays.

    Args:
        folder: each file or folder in it is one entry, last used when it was last changed or touched.
        most_bytes: of disk that all entries may take together.
    """
    room = most_bytes
    for place, entry in enumerate(sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)):
        files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        room -= sum(path.stat().st_blocks * 512 for path in files)
        if room < 0 and place > 0:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
