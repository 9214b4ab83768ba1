"""Rows that are rejection records already, and the data card's `rejected` without counts."""

from __future__ import annotations

from collections.abc import Iterator

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.records import RejectionRecord, Row, parse_record, pick_rejected_answers


def _matches(row: Row) -> bool:
    return "rejected_responses" in row or "rejectedResponses" in row or ("rejected" in row and "chosen" not in row)


def _read_records(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    record = parse_record(row)
    discards.duplicates_folded += len(pick_rejected_answers(row)) - len(record.rejected_responses)
    yield record


RECORDS = Format("records", "prompt, rejected_responses (or rejected without chosen)", _matches, _read_records)
