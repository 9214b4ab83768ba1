"""Questions, and the answers of each model to them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from buleyean_rl.void.store.database import Database, Row


class Questions:
    """The tables `questions` and `answers`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, uid: str, prompt: str, blind: bool, slots: Sequence[tuple[str, str]]) -> None:
        """Add a question and which models are to answer it; no effect if it was added before.

        Args:
            uid: the client's name for it.
            prompt: what is asked.
            blind: which model answers is not shown until it is revealed.
            slots: (side, model) in the order of the page.
        """
        with self._database.writing() as db:
            added = db.execute(
                "INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?, ?)", (uid, prompt, blind, not blind, time.time())
            )
            if added.rowcount:
                rows = [(uid, slot, side, model) for slot, (side, model) in enumerate(slots)]
                db.executemany("INSERT INTO answers (question, slot, side, model) VALUES (?, ?, ?, ?)", rows)

    def get(self, uid: str) -> Row | None:
        """A question with its answers (text None while they are generated) and their rejections."""
        with self._database.reading():
            select = self._database.select
            rows = select("SELECT * FROM questions WHERE id = ?", uid)
            if not rows:
                return None
            answers = select("SELECT * FROM answers WHERE question = ? ORDER BY slot", uid)
            rejections = select("SELECT * FROM rejections WHERE question = ? AND undone IS NULL ORDER BY id", uid)
        for answer in answers:
            answer["rejections"] = [
                {"id": rejection["id"], "spans": json.loads(rejection["spans"]), "reason": rejection["reason"]}
                for rejection in rejections
                if rejection["slot"] == answer["slot"]
            ]
        return rows[0] | {"answers": answers}

    def finish_answer(self, uid: str, slot: int, text: str) -> None:
        """Store a finished answer."""
        with self._database.writing() as db:
            db.execute("UPDATE answers SET text = ? WHERE question = ? AND slot = ?", (text, uid, slot))

    def reveal(self, uid: str) -> None:
        """Show which model gave which answer."""
        with self._database.writing() as db:
            db.execute("UPDATE questions SET revealed = 1 WHERE id = ?", (uid,))
