"""Imported files: each is known by its bytes, and undone as one."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from buleyean_rl.void.store.database import Database, Row
from buleyean_rl.void.store.rejections import INSERT

CHUNK = 2_000  # rejections that are stored at a time
UNFINISHED = -1  # rejections of an import that is being stored: until its end they count as undone


@dataclass(frozen=True)
class ImportedFile:
    """A file to import.

    Args:
        uid: the client's name for the import.
        sha256: of the file's bytes.
        name: of the file.
    """

    uid: str
    sha256: str
    name: str


class Imports:
    """The table `imports`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._discard_unfinished()  # of a server that was killed

    def add(self, file: ImportedFile, format: str, records: int, rows: Iterable[Row]) -> Row:
        """Add an import with its rejections, all or none; returns it, or the one with this uid.

        Args:
            file: what is imported.
            format: that it was read as.
            records: prompts in it.
            rows: see `record_rows`.
        """
        self._discard_unfinished()  # of one that a full disk ended
        now = time.time()
        with self._database.writing() as db:
            added = db.execute(
                """INSERT OR IGNORE INTO imports (uid, sha256, name, format, records, rejections, created, undone)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                (file.uid, file.sha256, file.name, format, records, UNFINISHED, now, now),
            )
        if added.rowcount:
            shared = {"reason": "", "source": "import", "created": now, "import": added.lastrowid, "undone": now}
            try:
                self._insert(row | shared | {"uid": f"{file.uid}/{number}"} for number, row in enumerate(rows))
            except BaseException:
                with suppress(OSError, sqlite3.Error):  # the disk is full: later then
                    self._discard_unfinished()
                raise
            count = "SELECT COUNT(*) FROM rejections WHERE import = imports.id AND count > 0"
            with self._database.writing() as db:
                db.execute(f"UPDATE imports SET rejections = ({count}), undone = NULL WHERE id = ?", (added.lastrowid,))
                db.execute("UPDATE rejections SET undone = NULL WHERE import = ?", (added.lastrowid,))
        stored = self.find(file.uid)
        assert stored is not None
        return stored

    def _insert(self, rows: Iterator[Row]) -> None:
        """Add rejections a chunk at a time, so that others may write in between."""
        while chunk := list(islice(rows, CHUNK)):
            with self._database.writing() as db:
                db.executemany(INSERT, chunk)

    def _discard_unfinished(self) -> None:
        """Delete what there is of an import that did not come to its end."""
        unfinished = f"SELECT id FROM imports WHERE rejections = {UNFINISHED}"
        if self._database.all(unfinished):
            with self._database.writing() as db:
                db.execute(f"DELETE FROM rejections WHERE import IN ({unfinished})")
                db.execute(f"DELETE FROM imports WHERE rejections = {UNFINISHED}")

    def find(self, uid: str) -> Row | None:
        """The import of a uid."""
        return self._database.one(f"SELECT * FROM imports WHERE uid = ? AND rejections <> {UNFINISHED}", uid)

    def find_file(self, sha256: str) -> Row | None:
        """The newest import of a file that is not undone."""
        return self._database.one(
            "SELECT * FROM imports WHERE sha256 = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", sha256
        )

    def list(self) -> list[Row]:
        """All imports, newest first."""
        return self._database.all(f"SELECT * FROM imports WHERE rejections <> {UNFINISHED} ORDER BY id DESC")

    def get(self, identity: int) -> Row | None:
        """The import of an id."""
        return self._database.one("SELECT * FROM imports WHERE id = ?", identity)

    def undo(self, identity: int, undone: bool = True) -> None:
        """Undo all rejections of an import, or redo those that were undone with it."""
        now = time.time()
        with self._database.writing() as db:
            if undone:
                rejections = "UPDATE rejections SET undone = ? WHERE import = ? AND undone IS NULL"
                changed = db.execute("UPDATE imports SET undone = ? WHERE id = ? AND undone IS NULL", (now, identity))
                if changed.rowcount:
                    db.execute(rejections, (now, identity))
            else:
                rejections = "UPDATE rejections SET undone = NULL WHERE import = ? AND undone = ?"
                row = db.execute("SELECT undone FROM imports WHERE id = ?", (identity,)).fetchone()
                if row and row["undone"] is not None:
                    db.execute(rejections, (identity, row["undone"]))
                    db.execute("UPDATE imports SET undone = NULL WHERE id = ?", (identity,))
