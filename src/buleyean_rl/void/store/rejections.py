"""Rejections by people and from imports: listed, searched, undone, exported as records."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from buleyean_rl.data.records import RejectionRecord, Spans, fold_records, make_record
from buleyean_rl.void.store.conversations import like
from buleyean_rl.void.store.database import Database, Row
from buleyean_rl.void.store.subject import hash_texts, subject_of

PAGE = 50  # rejections on a page
MAX_SHOWN = 10_000  # characters of a prompt or an answer there: an imported one may be a book
EXCERPT = 120  # characters
# An answer that was up for rejection and never was anchors; it is no rejection itself.
ACTIVE = "undone IS NULL AND count > 0"
INSERT = """INSERT OR IGNORE INTO rejections
    (uid, digest, subject, prompt, answer, spans, count, rounds, drawn, reason, source, created, undone, import)
    VALUES (:uid, :digest, :subject, :prompt, :answer, :spans, :count, :rounds, :drawn, :reason, :source, :created,
    :undone, :import)"""
SAME = """SELECT id, reason FROM rejections
    WHERE uid = ? OR (digest = ? AND undone IS NULL AND count = ? AND import IS NULL)"""
UNDONE_REASON = """SELECT reason FROM rejections WHERE digest = ? AND undone IS NOT NULL AND reason != ''
    ORDER BY undone DESC LIMIT 1"""


class RejectedAnswer(NamedTuple):
    """An answer with all that is rejected of it.

    Args:
        text: of the answer.
        spans: the rejected parts; none where all of it is rejected.
        is_greedy: whether it was given here at temperature 0: asked again, its model gave it again.
    """

    text: str
    spans: Spans
    is_greedy: bool


class Rejections:
    """The table `rejections`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, uid: str, answer: Row, spans: Spans = (), reason: str = "", source: str = "page", fine: bool = False
    ) -> Row:
        """Add a rejection; returns id and reason of it, or of the same one that is there.

        Args:
            uid: the client's name for it.
            answer: a row of it; see `Conversations`.
            spans: the part that is rejected; none for the whole.
            reason: may be empty; then it is that of the same rejection, if it was made and undone before.
            source: page or judge.
            fine: it is no rejection: the answer was judged and is to stay.

        Raises:
            RecordError: the spans are not within the answer.
        """
        (row,) = record_rows(_judged(answer, spans, fine))
        with self._database.writing() as db:
            stored = db.execute(SAME, (uid, row["digest"], row["count"])).fetchone()
            if stored is None:
                if not reason:
                    earlier = db.execute(UNDONE_REASON, (row["digest"],)).fetchone()
                    reason = earlier["reason"] if earlier else ""
                values: Row = {"uid": uid, "reason": reason, "source": source, "created": time.time()}
                values |= {"undone": None, "import": None}
                stored = {"id": db.execute(INSERT, row | values).lastrowid, "reason": reason}
        return dict(stored)

    def set_reason(self, identities: Sequence[int], reason: str) -> int:
        """Set the reason of some; returns how many there are."""
        return self._update("reason = ?", reason, identities)

    def undo(self, identities: Sequence[int], undone: bool = True) -> int:
        """Undo some, or redo them; returns how many there are."""
        return self._update("undone = ?", time.time() if undone else None, identities)

    def count(self) -> int:
        """How many rejections there are."""
        return self._database.count(f"rejections WHERE {ACTIVE}")

    def newest(self, limit: int) -> list[Row]:
        """The newest, each with the words that are rejected."""
        rows = self._database.all(
            f"""SELECT id, substr(answer, 1, {MAX_SHOWN}) AS answer, spans, reason FROM rejections WHERE {ACTIVE}
            ORDER BY id DESC LIMIT ?""",
            limit,
        )
        return [
            {"id": row["id"], "text": rejected_words(row["answer"], json.loads(row["spans"])), "reason": row["reason"]}
            for row in rows
        ]

    def examples(self, limit: int) -> list[tuple[str, list[RejectedAnswer]]]:
        """Newest rejected prompts that a person might have asked, as JSON, each with its newest rejected answers."""
        prompts = self._database.all(
            f"""SELECT prompt FROM rejections WHERE {ACTIVE} AND length(prompt) <= {MAX_SHOWN}
            AND length(answer) <= {MAX_SHOWN} GROUP BY prompt ORDER BY MAX(id) DESC LIMIT ?""",
            limit,
        )
        return [(row["prompt"], self._rejected_answers(row["prompt"])) for row in prompts]

    def page(self, page: int = 0, words: str = "") -> Row:
        """A page of rejections, newest first.

        Args:
            page: from 0.
            words: in a prompt, an answer or a reason.
        """
        where, pattern = ACTIVE, (like(words),) * 3 if words else ()
        if words:
            where += " AND (prompt LIKE ? ESCAPE '\\' OR answer LIKE ? ESCAPE '\\' OR reason LIKE ? ESCAPE '\\')"
        with self._database.reading():
            rows = self._database.select(
                f"""SELECT id, substr(prompt, 1, {MAX_SHOWN}) AS prompt, length(prompt) AS prompt_length,
                substr(answer, 1, {MAX_SHOWN}) AS answer, length(answer) AS answer_length, spans, reason, source,
                created FROM rejections WHERE {where} ORDER BY id DESC LIMIT ? OFFSET ?""",
                *(*pattern, PAGE, page * PAGE),
            )
            (total,) = self._database.select(f"SELECT COUNT(*) AS n FROM rejections WHERE {where}", *pattern)
        for row in rows:
            is_cut = row.pop("prompt_length") > MAX_SHOWN
            prompt = row["prompt"] + "…" if is_cut else text_of_prompt(row["prompt"])
            row |= {"prompt": prompt, "spans": json.loads(row["spans"])}
            row["cut"] = is_cut or row.pop("answer_length") > MAX_SHOWN
            row.pop("answer_length", None)
        return {"rows": rows, "total": total["n"], "page": page, "page_size": PAGE}

    def records(self) -> list[RejectionRecord]:
        """All rejections as records, one per prompt, and the answers that were up for rejection and never were."""
        rows = self._database.all(
            "SELECT prompt, answer, spans, count, rounds, drawn FROM rejections WHERE undone IS NULL ORDER BY id"
        )
        return fold_records(map(_row_record, rows))

    def _rejected_answers(self, prompt: str) -> list[RejectedAnswer]:
        rows = self._database.all(
            f"""SELECT answer, spans, source, drawn FROM rejections WHERE {ACTIVE} AND prompt = ?
            AND length(answer) <= {MAX_SHOWN} ORDER BY id DESC LIMIT {PAGE}""",
            prompt,
        )
        answers: dict[str, list[Row]] = {}
        for row in rows:
            answers.setdefault(row["answer"], []).append(row | {"spans": json.loads(row["spans"])})
        return [
            RejectedAnswer(
                text,
                tuple(sorted((start, end) for row in same for start, end in row["spans"]))
                if all(row["spans"] for row in same)
                else (),
                any(row["source"] != "import" and _temperature(row) == 0 for row in same),
            )
            for text, same in answers.items()
        ]

    def _update(self, change: str, value: Any, identities: Sequence[int]) -> int:
        marks = ", ".join("?" * len(identities))
        with self._database.writing() as db:
            return db.execute(f"UPDATE rejections SET {change} WHERE id IN ({marks})", (value, *identities)).rowcount


def record_rows(record: RejectionRecord) -> list[Row]:
    """A record's answers as rows of the table: those of its columns that say what was rejected."""
    prompt: Any = record.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": role, "content": content} for role, content in prompt]
    rows = []
    for judged in record.entries():
        texts = json.dumps(prompt), judged.text, json.dumps(judged.spans)
        row: Row = dict(zip(("prompt", "answer", "spans"), texts, strict=True))
        drawn: dict[str, Any] = {
            "token_ids": judged.token_ids,
            "ended": judged.ended,
            "tokenizer": record.tokenizer,
            "policy": record.policy,
        }
        row |= {"drawn": json.dumps(drawn) if any(value is not None for value in drawn.values()) else None}
        row |= {"digest": hash_texts(*texts), "subject": subject_of(*texts[:2])}
        rows.append(row | {"count": judged.count, "rounds": judged.rounds})
    return rows


def _judged(answer: Row, spans: Spans, fine: bool) -> RejectionRecord:
    """An answer that was given here and judged once, as a record."""
    drawn, text = json.loads(answer["drawn"] or "{}"), answer["text"] if answer["text"].strip() else ""
    has_ids = drawn.get("token_ids") is not None and bool(text)
    return make_record(
        json.loads(answer["context"]),
        [text],
        [0 if fine else 1],
        1,
        [list(spans)],
        token_ids=[drawn["token_ids"]] if has_ids else None,
        ended=[drawn.get("ended")],
        tokenizer=drawn["tokenizer"] if has_ids else None,
        policy=drawn.get("policy"),
    )


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


def _temperature(row: Row) -> Any:
    return (json.loads(row["drawn"] or "{}").get("policy") or {}).get("temperature")


def rejected_words(answer: str, spans: Sequence[Sequence[int]]) -> str:
    """The beginning of what is rejected of an answer, on one line."""
    words = " ".join("…".join(answer[start:end] for start, end in spans or [(0, len(answer))]).split())
    return words if len(words) <= EXCERPT else words[: EXCERPT - 1] + "…"


def text_of_prompt(prompt_json: str) -> str:
    """A prompt, stored as JSON, as text: a conversation becomes a transcript."""
    prompt = json.loads(prompt_json)
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
