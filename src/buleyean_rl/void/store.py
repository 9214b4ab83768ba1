"""Questions, answers, rejections and runs, in one SQLite file.

Every method that writes returns after the write is on disk. What clients send carries a name of theirs
(`uid`), so that sending it again after a broken connection changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import RejectionRecord, Spans, fold_records, make_record
from buleyean_rl.errors import UsageError

ROUNDS = 60  # a thumbs-down counts as 60 of 60
PAGE = 50  # rejections on a page

# One script a version; an older file is migrated when it is opened.
MIGRATIONS = (
    """
    CREATE TABLE questions (
        id TEXT PRIMARY KEY, prompt TEXT NOT NULL, blind INTEGER NOT NULL, revealed INTEGER NOT NULL,
        created REAL NOT NULL
    );
    CREATE TABLE answers (
        question TEXT NOT NULL REFERENCES questions, slot INTEGER NOT NULL, side TEXT NOT NULL, model TEXT NOT NULL,
        text TEXT, PRIMARY KEY (question, slot)
    );
    CREATE TABLE rejections (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, prompt TEXT NOT NULL,
        answer TEXT NOT NULL, spans TEXT NOT NULL, count INTEGER NOT NULL, rounds INTEGER NOT NULL,
        reason TEXT NOT NULL, source TEXT NOT NULL, created REAL NOT NULL, undone REAL
    );
    CREATE INDEX rejections_by_digest ON rejections (undone, digest, id);
    """,
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, folder TEXT NOT NULL, state TEXT NOT NULL,
        records INTEGER NOT NULL, steps INTEGER NOT NULL, error TEXT NOT NULL, created REAL NOT NULL, ended REAL
    );
    CREATE TABLE points (
        run INTEGER NOT NULL REFERENCES runs, step INTEGER NOT NULL, loss REAL NOT NULL, floor REAL NOT NULL,
        gap REAL NOT NULL, PRIMARY KEY (run, step)
    );
    CREATE TABLE samples (
        run INTEGER NOT NULL REFERENCES runs, position INTEGER NOT NULL, prompt TEXT NOT NULL, before TEXT NOT NULL,
        after TEXT NOT NULL, PRIMARY KEY (run, position)
    );
    """,
    """
    ALTER TABLE rejections ADD COLUMN question TEXT;
    ALTER TABLE rejections ADD COLUMN slot INTEGER;
    CREATE INDEX rejections_by_question ON rejections (question) WHERE question IS NOT NULL
    """,
)

Row = dict[str, Any]


class Store:
    """The file, for any number of threads.

    Args:
        path: made if it does not exist.

    Raises:
        UsageError: it is no such file, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changes = 0  # counts writes: pages poll it
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: is no store of rejections: {error}") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # --- questions ------------------------------------------------------------------------------------

    def add_question(self, uid: str, prompt: str, blind: bool, slots: Sequence[tuple[str, str]]) -> None:
        """Add a question and which models are to answer it; no effect if it was added before.

        Args:
            uid: the client's name for it.
            prompt: what is asked.
            blind: which model answers is not shown until it is revealed.
            slots: (side, model) in the order of the page.
        """
        with self._writing() as db:
            added = db.execute(
                "INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?, ?)", (uid, prompt, blind, not blind, time.time())
            )
            if added.rowcount:
                rows = [(uid, slot, side, model) for slot, (side, model) in enumerate(slots)]
                db.executemany("INSERT INTO answers (question, slot, side, model) VALUES (?, ?, ?, ?)", rows)

    def question(self, uid: str) -> Row | None:
        """A question with its answers (text None while they are generated) and their rejections."""
        with self._lock:
            row = self._one("SELECT * FROM questions WHERE id = ?", uid)
            if row is None:
                return None
            row["answers"] = self._all("SELECT * FROM answers WHERE question = ? ORDER BY slot", uid)
            rejections = self._all("SELECT * FROM rejections WHERE question = ? AND undone IS NULL ORDER BY id", uid)
            for answer in row["answers"]:
                answer["rejections"] = [
                    {"id": rejection["id"], "spans": json.loads(rejection["spans"]), "reason": rejection["reason"]}
                    for rejection in rejections
                    if rejection["slot"] == answer["slot"]
                ]
            return row

    def finish_answer(self, uid: str, slot: int, text: str) -> None:
        """Store a finished answer."""
        with self._writing() as db:
            db.execute("UPDATE answers SET text = ? WHERE question = ? AND slot = ?", (text, uid, slot))

    def reveal(self, uid: str) -> None:
        """Show which model gave which answer."""
        with self._writing() as db:
            db.execute("UPDATE questions SET revealed = 1 WHERE id = ?", (uid,))

    # --- rejections -----------------------------------------------------------------------------------

    def reject(
        self,
        uid: str,
        prompt: str,
        answer: str,
        spans: Spans,
        reason: str,
        source: str,
        answer_key: tuple[str | None, int | None] = (None, None),
    ) -> int:
        """Add a rejection; returns its id, or that of the one with this uid.

        Args:
            uid: the client's name for it.
            prompt: what was asked.
            answer: all of it.
            spans: the part that is rejected; none for the whole.
            reason: may be empty.
            source: where it came from.
            answer_key: question and slot of the answer, if it was given here.
        """
        record = make_record(prompt, [answer], [ROUNDS], ROUNDS, [list(spans)])
        with self._writing() as db:
            self._insert(db, uid, record, 0, reason, source, answer_key)
        row = self._one("SELECT id FROM rejections WHERE uid = ?", uid)
        assert row is not None
        return int(row["id"])

    def import_records(self, uid: str, records: Sequence[RejectionRecord], source: str) -> int:
        """Add all rejections of some records, unless this upload was added before; returns how many."""
        with self._writing() as db:
            before = db.total_changes
            for i, record in enumerate(records):
                for k in range(len(record.rejected_responses)):
                    self._insert(db, f"{uid}/{i}/{k}", record, k, "", source)
            return db.total_changes - before

    def set_reason(self, identity: int, reason: str) -> bool:
        """Set a reason; returns whether there is such a rejection."""
        with self._writing() as db:
            return bool(db.execute("UPDATE rejections SET reason = ? WHERE id = ?", (reason, identity)).rowcount)

    def undo(self, identity: int, undone: bool = True) -> bool:
        """Undo a rejection, or redo it; returns whether there is such a rejection."""
        with self._writing() as db:
            when = time.time() if undone else None
            return bool(db.execute("UPDATE rejections SET undone = ? WHERE id = ?", (when, identity)).rowcount)

    def count(self) -> int:
        """How many rejections there are."""
        row = self._one("SELECT COUNT(*) AS n FROM rejections WHERE undone IS NULL")
        return int(row["n"]) if row else 0

    def rejections(self, page: int = 0) -> Row:
        """A page of rejected answers, newest first, with how often each was rejected."""
        groups = self._all(
            """SELECT last.id, times, prompt, answer, spans, reason, source, created
            FROM (
                SELECT MAX(id) AS id, COUNT(*) AS times FROM rejections WHERE undone IS NULL
                GROUP BY digest ORDER BY 1 DESC LIMIT ? OFFSET ?
            ) AS last JOIN rejections USING (id) ORDER BY last.id DESC""",
            PAGE,
            page * PAGE,
        )
        for group in groups:
            group |= {"prompt": _as_text(json.loads(group["prompt"])), "spans": json.loads(group["spans"])}
        total = self._one("SELECT COUNT(DISTINCT digest) AS n FROM rejections WHERE undone IS NULL")
        return {"rows": groups, "total": total["n"] if total else 0, "page": page, "page_size": PAGE}

    def records(self) -> list[RejectionRecord]:
        """All rejections as records, one per prompt."""
        rows = self._all("SELECT prompt, answer, spans, count, rounds FROM rejections WHERE undone IS NULL ORDER BY id")
        return fold_records(
            make_record(
                json.loads(row["prompt"]), [row["answer"]], [row["count"]], row["rounds"], [json.loads(row["spans"])]
            )
            for row in rows
        )

    # --- runs -----------------------------------------------------------------------------------------

    def add_run(self, uid: str, folder: str, records: int, steps: int) -> int:
        """Add a run; returns its id, or that of the one with this uid."""
        with self._writing() as db:
            db.execute(
                """INSERT OR IGNORE INTO runs (uid, folder, state, records, steps, error, created)
                VALUES (?, ?, 'running', ?, ?, '', ?)""",
                (uid, folder, records, steps, time.time()),
            )
        return int((self._one("SELECT id FROM runs WHERE uid = ?", uid) or {})["id"])

    def find_run(self, uid: str) -> Row | None:
        """The run of a uid."""
        return self._one("SELECT * FROM runs WHERE uid = ?", uid)

    def end_run(self, run: int, state: str, error: str = "") -> None:
        """Mark a run as done, failed or stopped."""
        with self._writing() as db:
            db.execute("UPDATE runs SET state = ?, error = ?, ended = ? WHERE id = ?", (state, error, time.time(), run))

    def add_point(self, run: int, point: Mapping[str, float]) -> None:
        """Add a step of a run, replacing one that is repeated after a restart."""
        with self._writing() as db:
            values = (run, point["step"], point["loss"], point["floor"], point["gap"])
            db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?)", values)

    def add_samples(self, run: int, samples: Sequence[tuple[str, str, str]]) -> None:
        """Add answers before and after a run, as (prompt, before, after)."""
        with self._writing() as db:
            rows = [(run, position, *sample) for position, sample in enumerate(samples)]
            db.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)", rows)

    def runs(self) -> list[Row]:
        """All runs, newest first, each with its last step."""
        return self._all(
            """SELECT runs.*, (SELECT MAX(step) FROM points WHERE run = runs.id) AS step
            FROM runs ORDER BY id DESC"""
        )

    def run(self, run: int) -> Row | None:
        """A run with its points and samples."""
        with self._lock:
            row = self._one("SELECT * FROM runs WHERE id = ?", run)
            if row is not None:
                row["points"] = self._all("SELECT step, loss, floor, gap FROM points WHERE run = ? ORDER BY step", run)
                row["samples"] = self._all("SELECT * FROM samples WHERE run = ? ORDER BY position", run)
            return row

    def _insert(
        self,
        db: sqlite3.Connection,
        uid: str,
        record: RejectionRecord,
        k: int,
        reason: str,
        source: str,
        answer_key: tuple[str | None, int | None] = (None, None),
    ) -> None:
        prompt: Any = record.prompt
        if not isinstance(prompt, str):
            prompt = [{"role": role, "content": content} for role, content in prompt]
        texts = json.dumps(prompt), record.rejected_responses[k], json.dumps(record.rejected_spans[k])
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        db.execute(
            """INSERT OR IGNORE INTO rejections
            (uid, digest, prompt, answer, spans, count, rounds, reason, source, created, question, slot)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                uid,
                digest,
                *texts,
                record.rejection_counts[k],
                record.rounds[k],
                reason,
                source,
                time.time(),
                *answer_key,
            ),
        )

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise UsageError(f"{self.path}: was made by a later version of buleyean-rl: update it")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            # executescript would commit before it begins
            with self._writing() as db:
                for statement in script.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self.changes += 1

    def _all(self, query: str, *values: Any) -> list[Row]:
        with self._lock:
            return [dict(row) for row in self._connection.execute(query, values)]

    def _one(self, query: str, *values: Any) -> Row | None:
        row = self._all(query, *values)
        return row[0] if row else None


def _as_text(prompt: Any) -> str:
    """A prompt as text: a conversation becomes a transcript."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
