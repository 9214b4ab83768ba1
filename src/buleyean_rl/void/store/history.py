"""What a model is told of the conversation so far: what was said, without what was rejected of it.

A rejected answer in the history is an example to follow: asked again, both models would say it again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from buleyean_rl.data.records import Spans

READABLE = ("done", "cut", "stopped")  # states of answers
LATEST = """attempt = (
    SELECT MAX(attempt) FROM answers AS other WHERE other.turn = answers.turn AND other.slot = answers.slot)"""
EARLIER = f"""SELECT position, prompt, model, slot, text, state, subject FROM turns JOIN answers ON turn = turns.id
    WHERE conversation = ? AND position < ? AND {LATEST} ORDER BY position, slot"""
REJECTIONS = "SELECT spans FROM rejections WHERE subject = ? AND undone IS NULL AND count > 0"

History = list[tuple[str, str]]  # (question, answer) of the earlier turns


def read_histories(
    db: sqlite3.Connection, conversation: str | None, before: int, slots: Sequence[tuple[int, str]]
) -> list[History]:
    """What each model is told of a conversation.

    Of each turn it is told its own answer; one that was rejected, or is not its own, is told as another model gave it.
    A turn of which nothing is left is left out with its question.

    Args:
        db: the store.
        conversation: which; None has no turns.
        before: only turns before this position.
        slots: the place and the model of each that is told.
    """
    turns: dict[int, list[sqlite3.Row]] = {}
    left: dict[tuple[int, int], str] = {}
    for row in db.execute(EARLIER, (conversation, before)).fetchall():
        rejected = [json.loads(spans) for (spans,) in db.execute(REJECTIONS, (row["subject"],))]
        text = without_rejected(row["text"], rejected)
        if row["state"] in READABLE and text.strip():
            turns.setdefault(row["position"], []).append(row)
            left[row["position"], row["slot"]] = text
    histories = []
    for slot, model in slots:
        said = [min(turn, key=lambda row: (row["model"] != model, row["slot"] != slot)) for turn in turns.values()]
        histories.append([(row["prompt"], left[row["position"], row["slot"]]) for row in said])
    return histories


def without_rejected(answer: str, rejections: Sequence[Spans]) -> str:
    """An answer without its rejected parts; empty where all of it is rejected.

    Args:
        answer: the text.
        rejections: the spans of each; none for the whole.
    """
    if not rejections:
        return answer
    if not all(rejections):
        return ""
    pieces, at = [], 0
    for start, end in sorted(span for spans in rejections for span in spans):
        pieces.append(answer[at : max(at, start)])
        at = max(at, end)
    return "".join([*pieces, answer[at:]]).strip()
