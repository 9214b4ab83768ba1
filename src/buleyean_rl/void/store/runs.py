"""Training runs, their steps, what became of their models, and answers before and after them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from buleyean_rl.data.records import Spans
from buleyean_rl.void.store.database import Database, Row

UNFINISHED = ("running", "stopping")
KEPT, BACK = "kept", "back"


class Sample(NamedTuple):
    """A rejected prompt asked again.

    Args:
        prompt: as shown.
        before: the answer that was rejected.
        after: the trained model's.
        unlearned: whether the trained model says what was rejected no more; None where nobody knows.
        spans: the rejected parts of `before`; none for all of it.
    """

    prompt: str
    before: str
    after: str
    unlearned: bool | None
    spans: Spans = ()


class Runs:
    """The tables `runs`, `points` and `samples`.

    A run's state is running, stopping, done, stopped or failed; its decision None, kept or back.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, uid: str, folder: str, records: int, rejections: int, steps: int) -> int:
        """Add a run; returns its id, or that of the one with this uid."""
        with self._database.writing() as db:
            values = (uid, folder, records, rejections, steps, time.time())
            added = db.execute(
                """INSERT OR IGNORE INTO runs (uid, folder, state, records, rejections, steps, error, created)
                VALUES (?, ?, 'running', ?, ?, ?, '', ?)""",
                values,
            )
            if added.rowcount:
                db.execute("UPDATE runs SET name = 'run ' || id WHERE uid = ?", (uid,))
        return int((self.find(uid) or {})["id"])

    def find(self, uid: str) -> Row | None:
        """The run of a uid."""
        return self._database.one("SELECT * FROM runs WHERE uid = ?", uid)

    def newest_id(self) -> int:
        """The largest id so far; 0 without any."""
        row = self._database.one("SELECT MAX(id) AS id FROM runs")
        return int(row["id"] or 0) if row else 0

    def set(self, run: int, **values: Any) -> bool:
        """Set columns of a run: name, decision, pair_before; returns whether there is one."""
        assignments = ", ".join(f"{name} = :{name}" for name in values)
        with self._database.writing() as db:
            where = "WHERE id = :id AND deleted IS NULL"
            return bool(db.execute(f"UPDATE runs SET {assignments} {where}", values | {"id": run}).rowcount)

    def delete(self, run: int) -> None:
        """Hide a run whose files are gone."""
        self.set(run, deleted=time.time())

    def mark_stopping(self, run: int) -> None:
        """Mark a run as about to end, with what it has learnt."""
        with self._database.writing() as db:
            db.execute("UPDATE runs SET state = 'stopping' WHERE id = ? AND state = 'running'", (run,))

    def end(self, run: int, state: str, error: str = "") -> None:
        """Mark a run as done, failed or stopped."""
        self.set(run, state=state, error=error, ended=time.time())

    def add_point(self, run: int, point: Mapping[str, float]) -> None:
        """Add a step of a run, replacing one that is repeated after a restart."""
        with self._database.writing() as db:
            values = (run, point["step"], point["loss"], point["floor"], point["gap"])
            db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?)", values)

    def add_samples(self, run: int, samples: Sequence[Sample]) -> None:
        """Add answers before and after a run."""
        with self._database.writing() as db:
            rows = [(run, at, *sample[:-1], json.dumps(sample.spans)) for at, sample in enumerate(samples)]
            db.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def list(self) -> list[Row]:
        """All runs, newest first, each with its last step."""
        return self._database.all(
            """SELECT runs.*, (SELECT MAX(step) FROM points WHERE run = runs.id) AS step
            FROM runs WHERE deleted IS NULL ORDER BY id DESC"""
        )

    def get(self, run: int) -> Row | None:
        """A run with its last step, points and samples."""
        with self._database.reading():
            select = self._database.select
            rows = select("SELECT * FROM runs WHERE id = ? AND deleted IS NULL", run)
            if not rows:
                return None
            points = select("SELECT step, loss, floor, gap FROM points WHERE run = ? ORDER BY step", run)
            samples = select("SELECT * FROM samples WHERE run = ? ORDER BY position", run)
        return rows[0] | {"points": points, "samples": samples, "step": points[-1]["step"] if points else None}
