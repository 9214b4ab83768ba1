"""Rows of a Void's store as tests need them."""

from __future__ import annotations

import json
from typing import Any

from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.void.store import ImportedFile, Store, TurnSettings
from buleyean_rl.void.store.rejections import record_rows


def given(text: str = "a", prompt: Any = "p", drawn: dict[str, Any] | None = None) -> dict[str, Any]:
    """An answer's row."""
    return {"context": json.dumps(prompt), "text": text, "drawn": drawn and json.dumps(drawn)}


def reject(store: Store, uid: str, answer: str = "a", **options: Any) -> int:
    return int(store.rejections.add(uid, given(answer), **options)["id"])


def asked(store: Store, uid: str = "turn-0001", prompt: str = "hi", conversation: str = "talk-0001", **how: Any) -> Any:
    """A turn of both models, whose answers wait."""
    settings, slots = TurnSettings(**how), [("base", "m"), ("run-1", "run 1")]
    assert store.conversations.ask(uid, conversation, prompt, settings, slots)
    return store.conversations.turn(uid)


def answered(store: Store, *texts: str, **how: Any) -> Any:
    """A turn, when its answers are written."""
    turn = asked(store, **how)
    for answer, text in zip(turn["answers"], texts, strict=True):
        store.conversations.save(answer, text, "done")
    return store.conversations.turn(turn["id"])


def add_import(store: Store, uid: str, records: list[RejectionRecord], sha256: str = "0") -> int:
    """Import records; returns how many rejections there are more."""
    before = store.rejections.count()
    rows = (row for record in records for row in record_rows(record))
    store.imports.add(ImportedFile(uid, sha256, "log.jsonl"), "records", len(records), rows)
    return store.rejections.count() - before
