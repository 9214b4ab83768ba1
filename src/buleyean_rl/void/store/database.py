"""An SQLite file for any number of threads: one connection writes, another reads and waits for no writer."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.void.store.schema import MIGRATIONS
from buleyean_rl.void.store.subject import subject_of

Row = dict[str, Any]
BUSY_SECONDS = 10
MAX_INTEGER = (1 << 63) - 1  # that SQLite can store
FULL_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)  # the latter where the file system says so late


class Database:
    """The file. Every transaction is on disk when its context ends.

    Args:
        path: made if it does not exist.

    Attributes:
        changes: number of transactions; pages poll it.

    Raises:
        UsageError: it is no such file, of a later version, or cannot be opened.
        OSError: the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.changes = path, 0
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            self._writer = self._connect()
            version = self._check_format()
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA foreign_keys = ON")
            self._migrate(version)
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
        except sqlite3.OperationalError as error:
            _raise_if_full(error, path)
            raise UsageError(f"{path} cannot be opened: {error}: check the folder's permissions") from error
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: is no store of rejections: {error}: name another folder") from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction.

        Raises:
            OSError: the disk is full; nothing has changed.
        """
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    _raise_if_full(error, self.path)
                raise
            self.changes += 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Every query in this context sees the same state."""
        with self._read_lock:
            self._reader.execute("BEGIN")
            try:
                yield
            finally:
                self._reader.execute("ROLLBACK")

    def all(self, query: str, *values: Any) -> list[Row]:
        """The rows of a query."""
        with self._read_lock:
            return self.select(query, *values)

    def one(self, query: str, *values: Any) -> Row | None:
        """The first row of a query."""
        rows = self.all(query, *values)
        return rows[0] if rows else None

    def count(self, rows: str, *values: Any) -> int:
        """How many rows a FROM clause has."""
        return int(self.all(f"SELECT COUNT(*) AS n FROM {rows}", *values)[0]["n"])

    def select(self, query: str, *values: Any) -> list[Row]:
        """The rows of a query in a `reading` context."""
        return [dict(row) for row in self._reader.execute(query, values)]

    def close(self) -> None:
        """Close the file."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=BUSY_SECONDS)
        connection.row_factory = sqlite3.Row
        connection.create_function("json_text", 1, json.dumps, deterministic=True)
        connection.create_function("subject_of", 2, subject_of, deterministic=True)
        return connection

    def _check_format(self) -> int:
        """The format of the file, before anything is written to it; 0 for a new one."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._writer.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version > len(MIGRATIONS):
            raise UsageError(
                f"{self.path}: is of format {version}, which a later version of buleyean-rl wrote; this one reads "
                f"formats up to {len(MIGRATIONS)}: update buleyean-rl, or name another folder"
            )
        if tables and (version == 0 or "rejections" not in tables):
            raise UsageError(f"{self.path}: is another program's database: name another folder")
        return int(version)

    def _migrate(self, version: int) -> None:
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            # executescript would commit before it begins
            with self.writing() as db:
                for statement in script.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")


def _raise_if_full(error: sqlite3.OperationalError, path: Path) -> None:
    if error.sqlite_errorcode & 0xFF in FULL_DISK:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
