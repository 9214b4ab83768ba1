"""Tables whose columns the user names; without a score column every row is a rejection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import (
    accepted_record,
    add_context,
    build_record,
    get_path,
    parse_answer,
    strip_answer,
    unpack_messages,
)
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.records import RejectionRecord, Row
from buleyean_rl.data.records.values import fail, list_keys
from buleyean_rl.errors import RecordError


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    cells = _pick_cells(row, choices)
    rejected: bool | None = True
    if "score" in cells:
        rejected = is_rejection(cells["score"], choices.below, f"column {choices.columns['score']!r}")
    discards.unrated += rejected is None
    discards.chosen_discarded += rejected is False
    discards.without_rejection += not rejected
    if rejected is None:
        return
    prompt = unpack_messages(cells["prompt"], "the prompt", discards)
    prompt = add_context({"system": cells.get("system")}, prompt, discards)
    if rejected:
        yield build_record(discards, prompt, [_parse_answer(cells["answer"], discards)])
        return
    try:
        answer = _parse_answer(cells["answer"], Discards())
    except RecordError:  # an accepted answer is only compared with rejected ones
        return
    yield from accepted_record(prompt, [answer])


def _parse_answer(cell: Any, discards: Discards) -> str:
    return strip_answer(parse_answer(cell, "the answer", discards), discards)


def _pick_cells(row: Row, choices: Choices) -> dict[str, Any]:
    """The cells of a row by their roles."""
    return {role: _pick_cell(row, column) for role, column in choices.columns.items()}


def _pick_cell(row: Row, column: str) -> Any:
    """The value of a column; a name with dots reaches into objects, and line ends in names count as spaces."""
    if column in row:
        return row[column]
    for name in row:
        if name.split() == column.split():
            return row[name]
    value = get_path(row, *column.split("."))
    return fail(f"has no column {column!r} (its columns: {list_keys(row)})") if value is None else value


# Never detected: the user asks for it by naming columns.
COLUMNS = Format("columns", "those that --column names", lambda _row: False, _read_records)
