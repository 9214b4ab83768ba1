"""Tables whose columns the user names; without a score column every row is a rejection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import build_record, read_acceptance
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.records import RejectionRecord, Row
from buleyean_rl.data.records.values import fail, list_keys


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    cells = _pick_cells(row, choices)
    prompt = cells["prompt"]
    if cells.get("system"):
        prompt = [{"role": "system", "content": cells["system"]}, {"role": "user", "content": prompt}]
    if "score" in cells and not is_rejection(cells["score"], choices.below, f"column {choices.columns['score']!r}"):
        yield from read_acceptance(discards, lambda: (prompt, cells["answer"]))
        return
    yield build_record(discards, prompt, [cells["answer"]])


def _pick_cells(row: Row, choices: Choices) -> dict[str, Any]:
    """The cells of a row by their roles."""
    for column in choices.columns.values():
        if column not in row:
            fail(f"has no column {column!r} (its columns: {list_keys(row)})")
    return {role: row[column] for role, column in choices.columns.items()}


# Never detected: the user asks for it by naming columns.
COLUMNS = Format("columns", "those that --column names", lambda _row: False, _read_records)
