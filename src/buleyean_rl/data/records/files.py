"""Records files: JSON Lines in, streamed and strict; JSON Lines out, whole or not at all.

file --read_rows--> a JSON object a line --parse_record--> a stream of records: `read_records`
records --format_record--> lines --open_output--> file: `write_records`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from buleyean_rl.data.records.prompt import as_messages
from buleyean_rl.data.records.record import FORMAT_VERSION, RejectionRecord, parse_record
from buleyean_rl.data.records.values import describe, fail
from buleyean_rl.errors import RecordError
from buleyean_rl.system.outputs import check_output_file, open_output

Row = dict[str, Any]

# Skip bad rows silently (True), tell each one to a function, or stop at the first (False).
SkipBad = bool | Callable[[RecordError], None]


def read_records(path: Path | str, *, skip_bad: SkipBad = False) -> Iterator[RejectionRecord]:
    """Stream the records of a JSON Lines file.

    Duplicates fold within a line, not across lines: `fold_records` or `fold_stream` does that.

    Args:
        path: the file.
        skip_bad: leave bad lines out instead of stopping at the first; a function is told each one.

    Raises:
        RecordError: with file and line; also for a file that is missing, empty, binary or has no good line.
    """
    count = 0
    for line, row in read_rows(path, skip_bad=skip_bad):
        try:
            record = parse_record(row)
        except RecordError as error:
            handle_bad_row(error, path, line, skip_bad)
            continue
        count += 1
        yield record
    if not count:
        raise RecordError("every line is bad: nothing is left to use", path=path)


def read_rows(path: Path | str, *, skip_bad: SkipBad = False) -> Iterator[tuple[int, Row]]:
    """Stream the JSON objects of a JSON Lines file with their line numbers, counted from 1.

    A byte-order mark, CRLF line ends and blank lines are fine.

    Args:
        path: the file.
        skip_bad: as in `read_records`, for lines that are not a JSON object.

    Raises:
        RecordError: with file and line; also for a file that is missing, empty or binary.
    """
    empty = True
    with open_bytes(path) as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.isspace() or not raw:
                continue
            if empty and raw.lstrip().startswith(b"["):
                problem = "is a JSON list, not JSON Lines: `buleyean data import` turns it into records"
                raise RecordError(problem, path=path)
            empty = False
            try:
                row = decode_json(raw)
                if not isinstance(row, dict):
                    fail(f"is {describe(row)}: each line must be one JSON object")
            except RecordError as error:
                handle_bad_row(error, path, line, skip_bad)
                continue
            yield line, row
    if empty:
        raise RecordError("is empty: it must hold one JSON object a line", path=path)


def handle_bad_row(error: RecordError, path: Path | str, line: int, skip_bad: SkipBad) -> None:
    """Raise a bad row's error with its place, or skip the row.

    Args:
        error: what is wrong, without a place.
        path: the file it came from.
        line: its line there.
        skip_bad: as in `read_records`.
    """
    placed = RecordError(error.problem, path=path, line=line)
    if not skip_bad:
        raise placed from error
    if callable(skip_bad):
        skip_bad(placed)


@contextmanager
def open_bytes(path: Path | str) -> Iterator[BufferedReader]:
    """Open a file of UTF-8 text for reading bytes, refusing what cannot be one.

    Raises:
        RecordError: missing, a folder, unreadable, or binary.
    """
    if Path(path).is_dir():
        raise RecordError("is a folder: name a file in it", path=path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - only the errors of opening are caught here
    except FileNotFoundError as error:
        raise RecordError("no such file: check the path", path=path) from error
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error
    with file:
        head = file.peek(8192)[:8192]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RecordError("is UTF-16 text: save it as UTF-8", path=path)
        if b"\0" in head or head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
            raise RecordError("is a binary file: JSON text is wanted, unpacked", path=path)
        yield file


def read_text(path: Path | str) -> str:
    """A whole file of UTF-8 text, without its byte-order mark.

    Raises:
        RecordError: as `open_bytes`, or not UTF-8; with the line.
    """
    with open_bytes(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path, line=line) from error


def decode_json(raw: bytes | str, decoder: json.JSONDecoder | None = None) -> Any:
    """One JSON value, strictly: UTF-8, no NaN or Infinity, no key twice in an object.

    Args:
        raw: the value and nothing else.
        decoder: `LENIENT_JSON` lets NaN and Infinity through.

    Raises:
        RecordError: says what is wrong, without a place.
    """
    try:
        return (decoder or STRICT_JSON).decode(raw.decode() if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 text (byte {error.start + 1} of the line): convert the file to UTF-8")
    except json.JSONDecodeError as error:
        fail(f"is not valid JSON ({error.msg} at column {error.colno}): each line must be one JSON object")
    except RecursionError:
        fail("is nested too deeply to be a record")
    except ValueError as error:  # a key twice, NaN, or a number of thousands of digits
        fail(f"is not valid JSON: {error}")


def _require_unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        earlier: set[str] = set()
        twice = next(name for name, _ in pairs if name in earlier or earlier.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_require_unique_keys, parse_constant=_refuse_constant)
# Of other people's data: Python writes a missing label as NaN.
LENIENT_JSON = json.JSONDecoder(object_pairs_hook=_require_unique_keys)
_encode = json.JSONEncoder(ensure_ascii=False).encode


def records_sha256(path: Path | str) -> str:
    """The SHA-256 of a records file's bytes, as `sha256sum` prints it."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_record(record: RejectionRecord) -> str:
    """A record as its canonical JSON line, without the line end.

    One number stands for the rounds of all answers where they are the same and no text stands here twice; what no
    answer has is left out. Only a line that an earlier version would misread names its format.
    """
    prompt, answers, rounds = record.prompt, record.rejected_responses, record.rounds
    # Text by text: for an object the encoder sets itself up anew, which takes longer than all of these.
    fields = [
        f'"prompt": {_encode(prompt)}' if isinstance(prompt, str) else f'"messages": {_encode(as_messages(prompt))}',
        f'"rejected_responses": [{", ".join(map(_encode, answers))}]',
        f'"rejection_counts": {list(record.rejection_counts)}',
    ]
    row: Row = {}
    if rounds.count(rounds[0]) == len(rounds) and len(set(answers)) == len(answers):
        fields.append(f'"total_rounds": {rounds[0]}')
    else:
        row = {"rounds": rounds, "format_version": FORMAT_VERSION}
    if any(record.rejected_spans):
        row["rejected_spans"] = record.rejected_spans
    for name, column in (("token_ids", record.token_ids), ("ended", record.ended)):
        if column.count(None) < len(column):
            row[name] = column
    for name, value in (("tokenizer", record.tokenizer), ("policy", record.policy)):
        if value is not None:
            row[name] = value
    if row:
        fields.append(_encode(row)[1:-1])
    return f"{{{', '.join(fields)}}}"


def write_records(path: Path | str, records: Iterable[RejectionRecord]) -> int:
    """Write a records file that appears whole or not at all.

    Args:
        path: the target; a file is replaced, a device or pipe written into.
        records: written in their order, as they are.

    Returns:
        How many were written.

    Raises:
        UsageError: the target is a folder, or its folder does not exist.
    """
    count, target = 0, Path(path)
    check_output_file(target, overwrite=True)
    with open_output(target) as file:
        for record in records:
            file.write(format_record(record).encode() + b"\n")
            count += 1
    return count
