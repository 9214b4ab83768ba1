"""Conversations, their turns, and each model's answers to them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from buleyean_rl.void.store.database import Database, Row
from buleyean_rl.void.store.history import LATEST, History, read_histories
from buleyean_rl.void.store.subject import context_of, subject_of

PAGE = 100  # conversations
TITLE = 80  # characters
UNFINISHED = ("waiting", "writing")
AGAIN_TEMPERATURE = 0.7  # of another answer, where the first was greedy
REJECTED = """EXISTS (
    SELECT 1 FROM turns CROSS JOIN answers ON answers.turn = turns.id
    CROSS JOIN rejections INDEXED BY rejections_by_subject ON rejections.subject = answers.subject
    WHERE turns.conversation = conversations.id AND rejections.undone IS NULL AND rejections.count > 0)"""


@dataclass(frozen=True)
class TurnSettings:
    """How a turn is answered.

    Args:
        system: the system prompt; may be empty.
        temperature: 0 is greedy.
        max_tokens: of an answer; *continue* writes as many more.
        blind: which model answers is not shown until it is revealed.
    """

    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 512
    blind: bool = False


Slots = Sequence[tuple[str, str]]  # (model, its name) in the order of the page


class Conversations:
    """The tables `conversations`, `turns` and `answers`.

    An answer's state is waiting, writing, done, cut (at its length), stopped (by a person) or failed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, words: str = "", before: float | None = None) -> Row:
        """A page of conversations, the last changed first.

        Args:
            words: in a title or a question.
            before: changed earlier than this.
        """
        pattern = like(words)
        rows = self._database.all(
            f"""SELECT id, title, created, changed, {REJECTED} AS rejected,
            (SELECT COUNT(*) FROM turns WHERE conversation = conversations.id) AS turns
            FROM conversations WHERE deleted IS NULL AND (? IS NULL OR changed < ?) AND (? = '%%'
            OR title LIKE ? ESCAPE '\\' OR EXISTS (
                SELECT 1 FROM turns WHERE conversation = conversations.id AND prompt LIKE ? ESCAPE '\\'))
            ORDER BY changed DESC LIMIT {PAGE + 1}""",
            *(before, before, pattern, pattern, pattern),
        )
        for row in rows:
            row["rejected"] = bool(row["rejected"])
        return {"conversations": rows[:PAGE], "more": len(rows) > PAGE}

    def count(self) -> int:
        """How many there are."""
        return self._database.count("conversations WHERE deleted IS NULL")

    def get(self, uid: str) -> Row | None:
        """A conversation with its turns; None where there is none, or it is deleted."""
        found = self._database.one("SELECT id, title, created FROM conversations WHERE id = ? AND deleted IS NULL", uid)
        return found and found | {"turns": self._turns("conversation = ?", uid)}

    def delete(self, uid: str, deleted: bool = True) -> bool:
        """Hide a conversation, or show it again; returns whether there is one. Its rejections stay."""
        when = time.time() if deleted else None
        with self._database.writing() as db:
            return bool(db.execute("UPDATE conversations SET deleted = ? WHERE id = ?", (when, uid)).rowcount)

    def ask(self, uid: str, conversation: str, prompt: str, settings: TurnSettings, slots: Slots) -> bool:
        """Add a turn whose answers wait; no effect if it was added before.

        Args:
            uid: the client's name for it.
            conversation: which it goes on, or begins.
            prompt: the question.
            settings: how it is answered.
            slots: the models that answer.

        Returns:
            False where an answer in the conversation is still being written.
        """
        now = time.time()
        with self._database.writing() as db:
            if db.execute("SELECT 1 FROM turns WHERE id = ?", (uid,)).fetchone():
                return True
            (unfinished, position) = db.execute(
                f"""SELECT SUM(state IN {UNFINISHED}), COALESCE(MAX(position) + 1, 0)
                FROM turns JOIN answers ON turn = turns.id WHERE conversation = ? AND {LATEST}""",
                (conversation,),
            ).fetchone()
            if unfinished:
                return False
            db.execute(
                """INSERT INTO conversations VALUES (?, ?, ?, ?, NULL)
                ON CONFLICT (id) DO UPDATE SET changed = excluded.changed, deleted = NULL""",
                (conversation, " ".join(prompt.split())[:TITLE], now, now),
            )
            told = [(slot, model) for slot, (model, _) in enumerate(slots)]
            histories = read_histories(db, conversation, position, told)
            add_turn(db, uid, (conversation, None, position), prompt, settings, slots, histories)
        return True

    def turn(self, uid: str) -> Row | None:
        """A turn with its answers, of each slot the last one."""
        return next(iter(self._turns("turns.id = ?", uid)), None)

    def reveal(self, uid: str) -> None:
        """Show which model gave which answer."""
        with self._database.writing() as db:
            db.execute("UPDATE turns SET revealed = 1 WHERE id = ?", (uid,))

    def answer(self, identity: int) -> Row | None:
        """An answer with its rejections."""
        found = self._database.one("SELECT * FROM answers WHERE id = ?", identity)
        return found and self._with_rejections([found])[0]

    def unfinished(self) -> list[Row]:
        """Answers of conversations that a server has left waiting or half written."""
        return self._database.all(
            f"""SELECT answers.*, max_tokens FROM answers JOIN turns ON turn = turns.id
            WHERE batch IS NULL AND state IN {UNFINISHED} ORDER BY answers.id"""
        )

    def save(self, answer: Row, text: str, state: str, *, error: str = "", drawn: Row | None = None) -> None:
        """Store what is written of an answer.

        Args:
            answer: a row of it.
            text: so far.
            state: see the class.
            error: what failed and what to do.
            drawn: what a record says of it besides its text; see `record_rows`.
        """
        subject = subject_of(answer["context"], text if text.strip() else "")
        as_json = None if drawn is None else json.dumps(drawn)
        with self._database.writing() as db:
            db.execute(
                "UPDATE answers SET text = ?, state = ?, error = ?, drawn = ?, subject = ? WHERE id = ?",
                (text, state, error, as_json, subject, answer["id"]),
            )

    def wait(self, identity: int) -> None:
        """Let an answer be written on."""
        with self._database.writing() as db:
            db.execute("UPDATE answers SET state = 'waiting' WHERE id = ?", (identity,))

    def again(self, answer: Row) -> None:
        """Add another answer in the slot of one, drawn differently; what was rejected meanwhile is not told again."""
        attempt = answer["attempt"] + 1
        values = answer | {"attempt": attempt, "seed": attempt, "state": "waiting", "text": "", "error": ""}
        values |= {"temperature": answer["temperature"] or AGAIN_TEMPERATURE, "drawn": None, "subject": ""}
        with self._database.writing() as db:
            turn = db.execute("SELECT * FROM turns WHERE id = ?", (answer["turn"],)).fetchone()
            told = [(answer["slot"], answer["model"])]
            (history,) = read_histories(db, turn["conversation"], turn["position"], told)
            values |= {"context": context_of(turn["system"], history, turn["prompt"])}
            db.execute(INSERT_ANSWER, values)  # once, if it is asked for twice at a time

    def _turns(self, where: str, value: str) -> list[Row]:
        with self._database.reading():
            turns = self._database.select(f"SELECT * FROM turns WHERE {where} ORDER BY position", value)
            answers = self._database.select(
                f"SELECT answers.* FROM answers JOIN turns ON turn = turns.id WHERE {where} AND {LATEST} ORDER BY slot",
                value,
            )
        self._with_rejections(answers)
        return [turn | {"answers": [each for each in answers if each["turn"] == turn["id"]]} for turn in turns]

    def _with_rejections(self, answers: list[Row]) -> list[Row]:
        """Answers with what is rejected of each, here or where the same was said before."""
        marks = ", ".join("?" * len(answers))
        rows = self._database.all(
            f"""SELECT id, subject, spans, reason FROM rejections INDEXED BY rejections_by_subject
            WHERE subject IN ({marks}) AND undone IS NULL AND count > 0 ORDER BY id""",
            *(answer["subject"] for answer in answers),
        )
        for answer in answers:
            answer["rejections"] = [
                {"id": row["id"], "spans": json.loads(row["spans"]), "reason": row["reason"]}
                for row in rows
                if row["subject"] == answer["subject"]
            ]
        return answers


INSERT_ANSWER = """INSERT OR IGNORE INTO answers
    (turn, slot, attempt, model, name, context, temperature, seed, state, text, error, drawn, subject)
    VALUES (:turn, :slot, :attempt, :model, :name, :context, :temperature, :seed, :state, :text, :error, :drawn,
    :subject)"""


def add_turn(
    db: sqlite3.Connection,
    uid: str,
    place: tuple[str | None, str | None, int],
    prompt: str,
    settings: TurnSettings,
    slots: Slots,
    histories: Sequence[History],
) -> None:
    """Add a turn and its answers, which wait, in a transaction.

    Args:
        db: in the transaction.
        uid: the client's name for the turn.
        place: conversation or batch, and its position there.
        prompt: the question.
        settings: how it is answered.
        slots: the models that answer.
        histories: of each slot, the earlier (question, answer) pairs.
    """
    values = asdict(settings) | {"id": uid, "prompt": prompt, "revealed": not settings.blind, "created": time.time()}
    values |= dict(zip(("conversation", "batch", "position"), place, strict=True))
    db.execute(
        """INSERT INTO turns (id, conversation, batch, position, prompt, system, temperature, max_tokens, blind,
        revealed, created) VALUES (:id, :conversation, :batch, :position, :prompt, :system, :temperature, :max_tokens,
        :blind, :revealed, :created)""",
        values,
    )
    answers = [
        {"turn": uid, "slot": slot, "attempt": 0, "model": model, "name": name, "temperature": settings.temperature}
        | {"context": context_of(settings.system, history, prompt), "seed": 0, "state": "waiting"}
        | {"text": "", "error": "", "drawn": None, "subject": ""}
        for slot, ((model, name), history) in enumerate(zip(slots, histories, strict=True))
    ]
    db.executemany(INSERT_ANSWER, answers)


def like(words: str) -> str:
    """A pattern of what holds words, for LIKE with the escape character \\."""
    for sign in "\\%_":
        words = words.replace(sign, "\\" + sign)
    return f"%{words}%"
