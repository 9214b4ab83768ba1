"""Rejection records: what people said no to, how often, out of how many rounds.

A records file is JSON Lines, one `RejectionRecord` a line. It streams: a file of any length is read, folded and
written without ever being in memory.

    values       JSON values: looked up, checked, described in error messages
    messages     a conversation, as any tool writes it
    prompt       a text or a conversation
    answers      one judged answer; several of a text as one
    record       RejectionRecord, and every check on one
    files        JSON Lines in and out
    rejecting    one rejection more, as a person gives it
    sorted_rows  rows of integers on disk, read again in order
    spool        records in temporary files, read again prompt by prompt
    folding      many records of a prompt --> one
    validation   what training would make of a file

What this package is not: it knows no tokenizer. `validate_records` is passed one function that measures.
"""

from buleyean_rl.data.records.answers import JudgedAnswer, Span, Spans, TokenIds
from buleyean_rl.data.records.files import (
    Row,
    SkipBad,
    decode_json,
    format_record,
    handle_bad_row,
    open_bytes,
    read_records,
    read_rows,
    read_text,
    records_sha256,
    write_records,
)
from buleyean_rl.data.records.folding import fold_records, fold_stream, write_folded
from buleyean_rl.data.records.messages import Messages, parse_messages
from buleyean_rl.data.records.prompt import Prompt, as_messages, looks_rendered, parse_prompt
from buleyean_rl.data.records.record import (
    HISTORY_KEYS,
    SYSTEM_KEYS,
    Policy,
    RejectionRecord,
    make_record,
    parse_record,
    pick_rejected_answers,
)
from buleyean_rl.data.records.validation import validate_records
from buleyean_rl.data.records.values import parse_text, pick

__all__ = [
    "HISTORY_KEYS",
    "SYSTEM_KEYS",
    "JudgedAnswer",
    "Messages",
    "Policy",
    "Prompt",
    "RejectionRecord",
    "Row",
    "SkipBad",
    "Span",
    "Spans",
    "TokenIds",
    "as_messages",
    "decode_json",
    "fold_records",
    "fold_stream",
    "format_record",
    "handle_bad_row",
    "looks_rendered",
    "make_record",
    "open_bytes",
    "parse_messages",
    "parse_prompt",
    "parse_record",
    "parse_text",
    "pick",
    "pick_rejected_answers",
    "read_records",
    "read_rows",
    "read_text",
    "records_sha256",
    "validate_records",
    "write_folded",
    "write_records",
]
