"""Rows to import: messages, and what a row is read as."""

from __future__ import annotations

from typing import Any

from buleyean_rl.data.importers import Choices
from buleyean_rl.data.importers.formats import detect_format, find_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Discards
from buleyean_rl.data.records import RejectionRecord


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def convert(
    row: dict[str, Any], name: str | None = None, choices: Choices = NO_CHOICES
) -> tuple[list[RejectionRecord], Discards]:
    """The records of a row that reject something, in a format or the one that is detected, and what was left out."""
    discards = Discards()
    row_format = find_format(name, choices) if name else detect_format([row], choices)
    records = list(row_format.read_records(row, discards, choices))
    return [record for record in records if record.rejects], discards
