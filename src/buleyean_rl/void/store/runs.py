"""Training runs, their steps, and answers before and after them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from buleyean_rl.void.store.database import Database, Row

UNFINISHED = ("running", "stopping")


class Runs:
    """The tables `runs`, `points` and `samples`.

    A run's state is running, stopping, done, stopped or failed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, uid: str, folder: str, records: int, steps: int) -> int:
        """Add a run; returns its id, or that of the one with this uid."""
        with self._database.writing() as db:
            db.execute(
                """INSERT OR IGNORE INTO runs (uid, folder, state, records, steps, error, created)
                VALUES (?, ?, 'running', ?, ?, '', ?)""",
                (uid, folder, records, steps, time.time()),
            )
        return int((self.find(uid) or {})["id"])

    def find(self, uid: str) -> Row | None:
        """The run of a uid."""
        return self._database.one("SELECT * FROM runs WHERE uid = ?", uid)

    def mark_stopping(self, run: int) -> None:
        """Mark a run as about to end, with what it has learnt."""
        with self._database.writing() as db:
            db.execute("UPDATE runs SET state = 'stopping' WHERE id = ? AND state = 'running'", (run,))

    def end(self, run: int, state: str, error: str = "") -> None:
        """Mark a run as done, failed or stopped."""
        with self._database.writing() as db:
            db.execute("UPDATE runs SET state = ?, error = ?, ended = ? WHERE id = ?", (state, error, time.time(), run))

    def add_point(self, run: int, point: Mapping[str, float]) -> None:
        """Add a step of a run, replacing one that is repeated after a restart."""
        with self._database.writing() as db:
            values = (run, point["step"], point["loss"], point["floor"], point["gap"])
            db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?)", values)

    def add_samples(self, run: int, samples: Sequence[tuple[str, str, str]]) -> None:
        """Add answers before and after a run, as (prompt, before, after)."""
        with self._database.writing() as db:
            rows = [(run, position, *sample) for position, sample in enumerate(samples)]
            db.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)", rows)

    def list(self) -> list[Row]:
        """All runs, newest first, each with its last step."""
        return self._database.all(
            """SELECT runs.*, (SELECT MAX(step) FROM points WHERE run = runs.id) AS step
            FROM runs ORDER BY id DESC"""
        )

    def get(self, run: int) -> Row | None:
        """A run with its points and samples."""
        with self._database.reading():
            select = self._database.select
            rows = select("SELECT * FROM runs WHERE id = ?", run)
            if not rows:
                return None
            points = select("SELECT step, loss, floor, gap FROM points WHERE run = ? ORDER BY step", run)
            samples = select("SELECT * FROM samples WHERE run = ? ORDER BY position", run)
        return rows[0] | {"points": points, "samples": samples}
