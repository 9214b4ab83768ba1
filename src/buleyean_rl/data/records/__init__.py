"""Rejection records: what people said no to, how often, out of how many rounds.

A records file is JSON Lines, one `RejectionRecord` a line. It streams: a file of any length is read,
folded and written without ever being held.

    record       RejectionRecord, every check on one, and how duplicates fold into counts
    files        JSON Lines in and out
    validation   what training would make of a file

What this package is not: it knows no tokenizer. `validate_records` is handed one function that measures.
"""

from buleyean_rl.data.records.files import (
    FoldReport,
    Row,
    SkipBad,
    decode_json,
    format_record,
    open_bytes,
    read_records,
    read_rows,
    records_sha256,
    reject_row,
    write_folded,
    write_records,
)
from buleyean_rl.data.records.record import (
    Messages,
    Prompt,
    RejectionRecord,
    Span,
    Spans,
    accumulate_records,
    as_messages,
    fold_records,
    make_record,
    merge_records,
    parse_messages,
    parse_prompt,
    parse_record,
    parse_text,
    pick,
    rejected_answers,
)
from buleyean_rl.data.records.validation import Measure, Validation, validate_records

__all__ = [
    "FoldReport",
    "Measure",
    "Messages",
    "Prompt",
    "RejectionRecord",
    "Row",
    "SkipBad",
    "Span",
    "Spans",
    "Validation",
    "accumulate_records",
    "as_messages",
    "decode_json",
    "fold_records",
    "format_record",
    "make_record",
    "merge_records",
    "open_bytes",
    "parse_messages",
    "parse_prompt",
    "parse_record",
    "parse_text",
    "pick",
    "read_records",
    "read_rows",
    "records_sha256",
    "reject_row",
    "rejected_answers",
    "validate_records",
    "write_folded",
    "write_records",
]
