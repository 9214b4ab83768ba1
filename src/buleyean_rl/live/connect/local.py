"""A file or a folder that grows: any log that `data import` reads."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.errors import UsageError
from buleyean_rl.live.connect.source import Cursor, Fetched


class LocalLog:
    """A log on this machine.

    Args:
        path: of a file, or of a folder of files.
    """

    format = "auto"

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        self._path = path.absolute()

    async def fetch(self, rows: Path, cursor: Cursor) -> Fetched:  # noqa: ARG002 - the log holds them
        """See `Source.fetch`."""
        folder = self._path.is_dir()
        files = sorted(path for path in self._path.rglob("*") if path.is_file()) if folder else [self._path]
        statuses = [(str(path), path.stat()) for path in files]
        state = {"files": [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]}
        return Fetched(None if state == cursor else state, self._path)

    async def close(self) -> None:
        """Nothing is open."""
