"""Completions that can still be rejected, and the records that rejections of them become.

    completion --kept for a week--> completions.db --feedback--> verdict, kept --> rejections.jsonl, for `train`

The records file is made from the verdicts, and made anew where one changes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import RejectionRecord, format_record, make_record
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.live.target import Target
from buleyean_rl.live.transcript import Completion
from buleyean_rl.system.files import atomic_write

DATABASE, RECORDS = "completions.db", "rejections.jsonl"
KEEP_SECONDS = 7 * 24 * 3600
MAX_COMPLETIONS = 100_000  # without a verdict
SWEEP_EVERY = 100  # completions
TABLE = """
    CREATE TABLE IF NOT EXISTS completions (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created REAL NOT NULL, messages TEXT NOT NULL,
        answer TEXT NOT NULL, drawn TEXT NOT NULL, verdict TEXT
    );
    CREATE INDEX IF NOT EXISTS unjudged ON completions (created) WHERE verdict IS NULL;
    CREATE INDEX IF NOT EXISTS judged ON completions (number) WHERE verdict IS NOT NULL;
"""


class UnknownCompletion(UsageError):
    """No completion of that name is remembered."""


class CompletionStore:
    """The folder of completions; for any number of threads.

    Args:
        folder: this process's alone.

    Raises:
        UsageError: what is there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock, self._added = folder, threading.Lock(), 0
        try:
            self._db = sqlite3.connect(folder / DATABASE, check_same_thread=False, isolation_level=None)
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "completions" not in tables:
                raise sqlite3.DatabaseError("is another program's database")
            (folder / DATABASE).chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(TABLE)
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{folder / DATABASE}: {error}: name another folder") from error
        self._sweep()
        self._write_all()

    def add(self, completion: Completion, target: Target, *, is_base: bool) -> None:
        """Remember a completion.

        Args:
            completion: that was sent.
            target: what answered.
            is_base: whether it was the base alone.
        """
        has_ids = completion.token_ids is not None and target.tokenizer is not None
        policy = {"model": target.base} | ({} if is_base or target.adapter is None else {"adapter": target.name})
        drawn: dict[str, Any] = {
            "token_ids": [completion.token_ids] if has_ids else None,
            "tokenizer": target.tokenizer if has_ids else None,
            "ended": [completion.ended],
            "policy": policy | ({} if completion.temperature is None else {"temperature": completion.temperature}),
        }
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO completions (id, created, messages, answer, drawn) VALUES (?, ?, ?, ?, ?)",
                (completion.id, time.time(), json.dumps(completion.messages), completion.answer, json.dumps(drawn)),
            )
            self._added += 1
            if self._added % SWEEP_EVERY == 0:
                self._sweep()

    def judge(self, identity: str, verdict: dict[str, Any]) -> int:
        """Take feedback on a completion; what was said of it before no longer counts.

        Args:
            identity: of the completion.
            verdict: `rejected`, with `spans` of what is wrong, [] for all of it, and a `reason` for people.

        Returns:
            How many completions have a verdict.

        Raises:
            UnknownCompletion: it is not remembered, or no longer.
            RecordError: the spans are none of this answer.
        """
        with self._lock:
            row = self._db.execute(
                "SELECT messages, answer, drawn, verdict, number FROM completions WHERE id = ?", (identity,)
            ).fetchone()
            if row is None:
                raise UnknownCompletion(f"no completion {identity!r} is remembered: plain ones are, for a week")
            messages, answer, drawn, before, number = row
            line = _line(messages, answer, drawn, verdict)
            with self._transaction():
                self._db.execute("UPDATE completions SET verdict = ? WHERE number = ?", (json.dumps(verdict), number))
                if before is None:
                    self._append(line)
                else:
                    self._write_all()
            return int(self._db.execute("SELECT COUNT(*) FROM completions WHERE verdict IS NOT NULL").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A verdict is in the database and in the records file, or in neither."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _append(self, line: str) -> None:
        path = self._folder / RECORDS
        end = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(f"{line}\n".encode())
        except OSError:  # such as a full disk: half a line would spoil the next one
            os.truncate(path, end)
            raise

    def _sweep(self) -> None:
        """Forget what is old, and the oldest of too many; never what was judged."""
        self._db.execute("DELETE FROM completions WHERE verdict IS NULL AND created < ?", (time.time() - KEEP_SECONDS,))
        self._db.execute(
            "DELETE FROM completions WHERE verdict IS NULL AND number <= "
            "(SELECT number FROM completions WHERE verdict IS NULL ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (MAX_COMPLETIONS,),
        )

    def _write_all(self) -> None:
        with atomic_write(self._folder / RECORDS) as file:
            for line in self._lines():
                file.write(f"{line}\n".encode())

    def _lines(self) -> Iterator[str]:
        query = "SELECT messages, answer, drawn, verdict FROM completions WHERE verdict IS NOT NULL ORDER BY number"
        for messages, answer, drawn, verdict in self._db.execute(query):
            yield _line(messages, answer, drawn, json.loads(verdict))


def _line(messages: str, answer: str, drawn: str, verdict: dict[str, Any]) -> str:
    line = format_record(_record(json.loads(messages), answer, json.loads(drawn), verdict))
    if not verdict["reason"]:
        return line
    return f'{line[:-1]}, "remark": {json.dumps(verdict["reason"], ensure_ascii=False)}}}'


def _record(messages: Any, answer: str, drawn: dict[str, Any], verdict: dict[str, Any]) -> RejectionRecord:
    is_rejected, spans = verdict["rejected"], verdict["spans"]
    if spans and not is_rejected:
        raise RecordError("'spans' say what is wrong, and 'rejected' says that nothing is: leave one out")
    text = answer if answer.strip() else ""
    return make_record(messages, [text], [int(is_rejected)], 1, [spans] if spans else None, **drawn)
