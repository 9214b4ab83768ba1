"""Batches of prompts that are answered in the background and judged one by one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from buleyean_rl.void.store.conversations import Conversations, Slots, TurnSettings, add_turn
from buleyean_rl.void.store.database import Database, Row
from buleyean_rl.void.store.history import LATEST
from buleyean_rl.void.store.rejections import Rejections
from buleyean_rl.void.store.subject import hash_texts

REJECTED, FINE, SKIPPED = "rejected", "fine", "skipped"
SUMMARY = f"""SELECT batches.*,
    (SELECT COUNT(*) FROM turns WHERE batch = batches.id) AS prompts,
    (SELECT COUNT(*) FROM turns WHERE batch = batches.id AND verdict IS NOT NULL) AS judged,
    (SELECT COUNT(*) FROM turns WHERE batch = batches.id AND verdict = '{REJECTED}') AS rejected,
    (SELECT COUNT(*) FROM turns WHERE batch = batches.id AND NOT EXISTS (
        SELECT 1 FROM answers WHERE turn = turns.id AND state IN ('waiting', 'writing'))) AS answered
    FROM batches WHERE deleted IS NULL"""


class Batches:
    """The table `batches`, and the turns that belong to one."""

    def __init__(self, database: Database, conversations: Conversations, rejections: Rejections) -> None:
        self._database, self._conversations, self._rejections = database, conversations, rejections

    def add(self, uid: str, name: str, prompts: Sequence[str], settings: TurnSettings, slots: Slots) -> Row:
        """Add a batch whose answers wait; returns it, or the one with this uid.

        Args:
            uid: the client's name for it.
            name: for people.
            prompts: a turn each.
            settings: how all of them are answered.
            slots: the models that answer.
        """
        models = json.dumps([{"model": model, "name": shown} for model, shown in slots])
        with self._database.writing() as db:
            row = (uid, name, models, time.time())
            added = db.execute("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, 0, ?, NULL)", row)
            for position, prompt in enumerate(prompts if added.rowcount else ()):
                add_turn(
                    db,
                    hash_texts(uid, str(position))[:32],
                    (None, uid, position),
                    prompt,
                    settings,
                    slots,
                    [[]] * len(slots),
                )
        found = self.get(uid)
        assert found is not None
        return found

    def all(self) -> list[Row]:
        """All batches, the newest first."""
        return [_with_state(row) for row in self._database.all(f"{SUMMARY} ORDER BY created DESC")]

    def count(self) -> int:
        """How many there are."""
        return self._database.count("batches WHERE deleted IS NULL")

    def get(self, uid: str) -> Row | None:
        """A batch; None where there is none, or it is deleted."""
        row = self._database.one(f"{SUMMARY} AND id = ?", uid)
        return row and _with_state(row)

    def set(self, uid: str, *, paused: bool = False, deleted: bool = False) -> bool:
        """Pause, resume or hide a batch; returns whether there is one."""
        values = (paused, time.time() if deleted else None, uid)
        with self._database.writing() as db:
            return bool(db.execute("UPDATE batches SET paused = ?, deleted = ? WHERE id = ?", values).rowcount)

    def waiting(self, limit: int) -> list[Row]:
        """The next answers to write, all of one batch and one model."""
        rows = self._database.all(
            """SELECT answers.*, max_tokens, batch FROM answers JOIN turns ON turn = turns.id
            JOIN batches ON batch = batches.id WHERE state IN ('waiting', 'writing') AND paused = 0
            AND batches.deleted IS NULL ORDER BY batches.created, batch, slot, position LIMIT ?""",
            limit,
        )
        first = rows[:1]
        return [row for row in rows if (row["batch"], row["model"]) == (first[0]["batch"], first[0]["model"])]

    def is_active(self, uid: str) -> bool:
        """Whether a batch is to be answered."""
        return bool(self._database.count("batches WHERE id = ? AND paused = 0 AND deleted IS NULL", uid))

    def cards(self, uid: str, start: int, count: int) -> list[Row]:
        """The turns of a batch from a position on."""
        rows = self._database.all(
            "SELECT id FROM turns WHERE batch = ? AND position >= ? ORDER BY position LIMIT ?", uid, start, count
        )
        return [turn for row in rows if (turn := self._conversations.turn(row["id"])) is not None]

    def next(self, uid: str) -> Row:
        """The first answered turn without a verdict, and whether more are being answered."""
        unjudged = f"""turns WHERE batch = ? AND verdict IS NULL AND {{}} EXISTS (
            SELECT 1 FROM answers WHERE turn = turns.id AND state IN ('waiting', 'writing') AND {LATEST})"""
        row = self._database.one(f"SELECT id FROM {unjudged.format('NOT')} ORDER BY position LIMIT 1", uid)
        waiting = self._database.count(unjudged.format(""), uid)
        return {"card": row and self._conversations.turn(row["id"]), "waiting": waiting > 0}

    def judge(self, turn: Row, uid: str, verdict: str | None, slot: int = 0, **said: Any) -> Row:
        """Set a turn's verdict, or take it back; returns the turn.

        Args:
            turn: as it is.
            uid: the client's name for the verdict.
            verdict: rejected makes a rejection, fine an anchor, skipped nothing; None takes back.
            slot: of the answer that is meant.
            said: spans and reason of a rejection.

        Raises:
            RecordError: the spans are not within the answer.
        """
        if turn["rejection"] is not None:
            self._rejections.undo([turn["rejection"]])
        row = None
        if verdict in (REJECTED, FINE):
            row = self._rejections.add(uid, turn["answers"][slot], source="judge", fine=verdict == FINE, **said)["id"]
        with self._database.writing() as db:
            db.execute("UPDATE turns SET verdict = ?, rejection = ? WHERE id = ?", (verdict, row, turn["id"]))
        found = self._conversations.turn(turn["id"])
        assert found is not None
        return found


def _with_state(row: Row) -> Row:
    """A batch as it stands: done, paused or answering."""
    state = "done" if row["answered"] == row["prompts"] else "paused" if row["paused"] else "answering"
    columns = ("id", "name", "created", "prompts", "answered", "judged", "rejected")
    return {name: row[name] for name in columns} | {"state": state, "models": json.loads(row["models"])}
