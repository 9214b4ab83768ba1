"""What a source of rated answers is, and the file that its rows are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from buleyean_rl.data.records import Row
from buleyean_rl.system.files import atomic_write, temporary_folder

Cursor = dict[str, Any]
OVERLAP = timedelta(hours=1)  # what is rated is listed late, in no order


@dataclass(frozen=True)
class Fetched:
    """What came of a visit.

    Args:
        cursor: where the next visit begins; None: nothing is new.
        path: of the rows, all of them.
    """

    cursor: Cursor | None
    path: Path


class Source(Protocol):
    """Where people rate answers.

    Attributes:
        format: of its rows, one of `data.importers.FORMATS`.
    """

    format: str

    async def fetch(self, rows: Path, cursor: Cursor) -> Fetched:
        """Bring a file of rows up to date.

        Args:
            rows: the file; it may not exist yet.
            cursor: of the visit before; {} at first.
        """

    async def close(self) -> None:
        """Close the connections."""


@dataclass
class NewRows:
    """Rows that join a file, in place of earlier ones of the same id.

    Attributes:
        count: of them.
    """

    _folder: Path
    _ids: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self._ids)

    def add(self, identity: str, row: Row) -> None:
        """Take a row; a second one of the same id is passed over."""
        if identity not in self._ids:
            self._ids.add(identity)
            with (self._folder / "new.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "id": identity}) + "\n")

    def join(self, rows: Path) -> None:
        """Write the file anew: earlier rows first."""
        with atomic_write(rows) as file:
            for path, ids in ((rows, self._ids), (self._folder / "new.jsonl", set[str]())):
                if path.exists():
                    with path.open("rb") as old:
                        file.writelines(line for line in old if not ids or json.loads(line)["id"] not in ids)


@contextmanager
def new_rows(rows: Path) -> Iterator[NewRows]:
    """Rows that are about to join a file."""
    with temporary_folder(rows) as folder:
        yield NewRows(folder)


def before(timestamp: str) -> str:
    """Where the next visit begins, of the latest timestamp of this one: both are ISO 8601."""
    return (datetime.fromisoformat(timestamp) - OVERLAP).isoformat()


def is_from(timestamp: str, begin: str) -> bool:
    """Whether a timestamp is `begin` or later; both are ISO 8601."""
    return datetime.fromisoformat(timestamp) >= datetime.fromisoformat(begin)
