"""Rows that are rejection records already, and the data card's `rejected` without counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from buleyean_rl.data.importers.literals import parse_messages_text
from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import pick_prompt, refuse_row
from buleyean_rl.data.records import (
    HISTORY_KEYS,
    SYSTEM_KEYS,
    RejectionRecord,
    Row,
    parse_record,
    pick_rejected_answers,
)


def _matches(row: Row) -> bool:
    if "rejected_responses" in row or "rejectedResponses" in row:
        return True
    return "rejected" in row and "chosen" not in row and not _holds_messages(row["rejected"])


def _holds_messages(rejected: object) -> bool:
    if isinstance(rejected, str):
        return parse_messages_text(rejected, "rejected") is not None
    first = rejected[0] if isinstance(rejected, list) and rejected else rejected
    return isinstance(first, Mapping)


def _read_records(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    answers = pick_rejected_answers(row)
    if answers is None:
        refuse_row("has no rejected answer", row)
    beside_prompt = dict.fromkeys(("messages", *SYSTEM_KEYS, *HISTORY_KEYS))
    record = parse_record({**row, **beside_prompt, "prompt": pick_prompt(row, discards)})
    discards.duplicates_folded += len(answers) - len(record.rejected_responses)
    if not record.rejects:
        discards.without_rejection += 1
        discards.chosen_discarded += len(record.rejected_responses)
    yield record


RECORDS = Format(
    "records",
    "prompt, rejected_responses (or rejected without chosen)",
    _matches,
    _read_records,
    keeps_accepted=True,
)
