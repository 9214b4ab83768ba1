"""Where things are kept between runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_folder() -> Path:
    """Converted models, kernels and answers: `buleyean-rl` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buleyean-rl"


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
