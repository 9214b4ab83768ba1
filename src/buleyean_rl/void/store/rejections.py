"""Rejections by people and from imports: listed, undone, exported as records."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from buleyean_rl.data.records import RejectionRecord, Spans, fold_records, make_record
from buleyean_rl.void.store.database import Database, Row

PAGE = 50  # rejections on a page
MAX_SHOWN = 10_000  # characters of a prompt or an answer there: an imported one may be a book
# An answer that was up for rejection and never was anchors; it is no rejection itself.
ACTIVE = "undone IS NULL AND count > 0"
INSERT = """INSERT OR IGNORE INTO rejections
    (uid, digest, prompt, answer, spans, count, rounds, drawn, reason, source, created, question, slot, import)
    VALUES (:uid, :digest, :prompt, :answer, :spans, :count, :rounds, :drawn, :reason, :source, :created, :question,
    :slot, :import)"""
UNDONE_REASON = """SELECT reason FROM rejections
    WHERE question = ? AND slot = ? AND spans = ? AND undone IS NOT NULL AND reason != ''
    ORDER BY undone DESC LIMIT 1"""


class Rejections:
    """The table `rejections`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        uid: str,
        prompt: str,
        answer: str,
        spans: Spans,
        reason: str,
        source: str,
        answer_key: tuple[str | None, int | None] = (None, None),
    ) -> Row:
        """Add a rejection; returns id and reason of it, or of the one with this uid.

        Args:
            uid: the client's name for it.
            prompt: what was asked.
            answer: all of it.
            spans: the part that is rejected; none for the whole.
            reason: may be empty; then it is that of the same rejection, if it was made and undone before.
            source: where it came from.
            answer_key: question and slot of the answer, if it was given here.

        Raises:
            RecordError: the spans are not within the answer.
        """
        record = make_record(prompt, [answer], [1], 1, [list(spans)])
        (row,) = record_rows(record)
        question, slot = answer_key
        with self._database.writing() as db:
            if not reason:
                earlier = db.execute(UNDONE_REASON, (question, slot, row["spans"])).fetchone()
                reason = earlier["reason"] if earlier else ""
            values = {"uid": uid, "reason": reason, "source": source, "created": time.time(), "import": None}
            db.execute(INSERT, row | values | {"question": question, "slot": slot})
        stored = self._database.one("SELECT id, reason FROM rejections WHERE uid = ?", uid)
        assert stored is not None
        return stored

    def set_reason(self, identity: int, reason: str) -> bool:
        """Set a reason; returns whether there is such a rejection."""
        with self._database.writing() as db:
            return bool(db.execute("UPDATE rejections SET reason = ? WHERE id = ?", (reason, identity)).rowcount)

    def undo(self, identity: int, undone: bool = True) -> bool:
        """Undo a rejection, or redo it; returns whether there is such a rejection."""
        with self._database.writing() as db:
            when = time.time() if undone else None
            return bool(db.execute("UPDATE rejections SET undone = ? WHERE id = ?", (when, identity)).rowcount)

    def count(self) -> int:
        """How many rejections there are."""
        row = self._database.one(f"SELECT COUNT(*) AS n FROM rejections WHERE {ACTIVE}")
        return int(row["n"]) if row else 0

    def page(self, page: int = 0) -> Row:
        """A page of rejected answers, newest first: how often each was rejected, and the last reason given."""
        with self._database.reading():
            groups = self._database.select(
                f"""SELECT last.id, times, substr(prompt, 1, {MAX_SHOWN}) AS prompt, length(prompt) AS length,
                substr(answer, 1, {MAX_SHOWN}) AS answer, spans, source, created, COALESCE((
                    SELECT reason FROM rejections AS given
                    WHERE given.undone IS NULL AND given.digest = rejections.digest AND reason != ''
                    ORDER BY given.id DESC LIMIT 1
                ), '') AS reason
                FROM (
                    SELECT MAX(id) AS id, COUNT(*) AS times FROM rejections WHERE {ACTIVE}
                    GROUP BY digest ORDER BY 1 DESC LIMIT ? OFFSET ?
                ) AS last JOIN rejections USING (id) ORDER BY last.id DESC""",
                PAGE,
                page * PAGE,
            )
            (total,) = self._database.select(f"SELECT COUNT(DISTINCT digest) AS n FROM rejections WHERE {ACTIVE}")
        for group in groups:
            is_cut = group.pop("length") > MAX_SHOWN
            prompt = group["prompt"] + "…" if is_cut else _as_text(json.loads(group["prompt"]))
            group |= {"prompt": prompt, "spans": json.loads(group["spans"])}
        return {"rows": groups, "total": total["n"], "page": page, "page_size": PAGE}

    def records(self) -> list[RejectionRecord]:
        """All rejections as records, one per prompt, and the answers that were up for rejection and never were."""
        rows = self._database.all(
            "SELECT prompt, answer, spans, count, rounds, drawn FROM rejections WHERE undone IS NULL ORDER BY id"
        )
        return fold_records(map(_row_record, rows))


def record_rows(record: RejectionRecord) -> list[Row]:
    """A record's answers as rows of the table: those of its columns that say what was rejected."""
    prompt: Any = record.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": role, "content": content} for role, content in prompt]
    rows = []
    for judged in record.entries():
        texts = json.dumps(prompt), judged.text, json.dumps(judged.spans)
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        row: Row = dict(zip(("prompt", "answer", "spans"), texts, strict=True))
        drawn: dict[str, Any] = {
            "token_ids": judged.token_ids,
            "ended": judged.ended,
            "tokenizer": record.tokenizer,
            "policy": record.policy,
        }
        row |= {"drawn": json.dumps(drawn) if any(value is not None for value in drawn.values()) else None}
        rows.append(row | {"digest": digest, "count": judged.count, "rounds": judged.rounds})
    return rows


def _row_record(row: Row) -> RejectionRecord:
    """A row as a record."""
    prompt = json.loads(row["prompt"])
    if not isinstance(prompt, str):
        prompt = tuple((message["role"], message["content"]) for message in prompt)
    spans = tuple((start, end) for start, end in json.loads(row["spans"]))
    drawn = json.loads(row["drawn"] or "{}")
    ids = drawn.get("token_ids")
    return RejectionRecord(
        prompt,
        (row["answer"],),
        (row["count"],),
        (row["rounds"],),
        (spans,),
        (None if ids is None else tuple(ids),),
        (drawn.get("ended"),),
        drawn.get("tokenizer"),
        drawn.get("policy"),
    )


def _as_text(prompt: Any) -> str:
    """A prompt as text: a conversation becomes a transcript."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
