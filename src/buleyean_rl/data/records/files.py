"""Records files: JSON Lines in, streamed and strict; JSON Lines out, whole or not at all.

bytes -> read_rows (one JSON object a line) -> parse_record -> a stream of records
records -> write_records, or write_folded, which makes one record of each prompt's many
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NoReturn

from buleyean_rl.data.records.record import RejectionRecord, fail, fold_records, kind_of, parse_record
from buleyean_rl.errors import RecordError

Row = dict[str, Any]

# Skip bad rows silently (True), tell each one to a function, or stop at the first (False).
SkipBad = bool | Callable[[RecordError], None]

CHUNK_BYTES = 1 << 20


def read_records(path: Path | str, *, skip_bad: SkipBad = False) -> Iterator[RejectionRecord]:
    """Stream the records of a JSON Lines file.

    Duplicates fold within a line, not across lines: `fold_records` or `buleyean data import` does that.

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
            reject_row(error, path, line, skip_bad)
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
                    fail(f"is {kind_of(row)}: each line must be one JSON object")
            except RecordError as error:
                reject_row(error, path, line, skip_bad)
                continue
            yield line, row
    if empty:
        raise RecordError("is empty: it must hold one JSON object a line", path=path)


def reject_row(error: RecordError, path: Path | str, line: int, skip_bad: SkipBad) -> None:
    """Raise a row's error with its place, or skip the row.

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


def decode_json(raw: bytes | str) -> Any:
    """One JSON value, strictly: UTF-8, no NaN or Infinity, no key twice in an object.

    Raises:
        RecordError: says what is wrong, without a place.
    """
    try:
        return STRICT_JSON.decode(raw.decode() if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 text (byte {error.start + 1} of the line): convert the file to UTF-8")
    except json.JSONDecodeError as error:
        fail(f"is not valid JSON ({error.msg} at column {error.colno}): each line must be one JSON object")
    except RecursionError:
        fail("is nested too deeply to be a record")
    except ValueError as error:  # a key twice, NaN, or a number of thousands of digits
        fail(f"is not valid JSON: {error}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_encode = json.JSONEncoder(ensure_ascii=False).encode


def records_sha256(path: Path | str) -> str:
    """The SHA-256 of a records file's bytes, as `sha256sum` prints it."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_record(record: RejectionRecord) -> str:
    """A record as its canonical JSON line, without the line end; spans only where an answer has any."""
    row: Row = {}
    if isinstance(record.prompt, str):
        row["prompt"] = record.prompt
    else:
        row["messages"] = [{"role": role, "content": content} for role, content in record.prompt]
    row["rejected_responses"] = record.rejected_responses
    row["rejection_counts"] = record.rejection_counts
    row["total_rounds"] = record.total_rounds
    if any(record.rejected_spans):
        row["rejected_spans"] = record.rejected_spans
    return _encode(row)


def write_records(path: Path | str, records: Iterable[RejectionRecord]) -> int:
    """Write a records file that appears whole or not at all.

    Args:
        path: the target; replaced if it exists.
        records: written in their order, as they are.

    Returns:
        How many were written.

    Raises:
        RecordError: the target is a folder, or its folder does not exist.
    """
    count = 0
    with _replacing(path) as file:
        for record in records:
            file.write(format_record(record).encode() + b"\n")
            count += 1
    return count


@dataclass
class FoldReport:
    """What `write_folded` wrote, and how much of it was repetition.

    Args:
        records: lines written, one per prompt.
        rejections: the sum of all counts.
        answers: rejected answers written, each once.
        answers_folded: rejected answers that repeated an earlier one of the same prompt in another record.
        prompts_repeated: records whose prompt an earlier one had.
        empty: answers written that are "".
    """

    records: int = 0
    rejections: int = 0
    answers: int = 0
    answers_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0


def write_folded(path: Path | str, records: Iterable[RejectionRecord], *, limit: int | None = None) -> FoldReport:
    """Write one record per prompt, in the order of first appearance, holding only an index in memory.

    Every record goes to a spool; prompts seen twice are remembered by place. The second pass copies the spool
    and merges those. The file appears whole or not at all, and not if there is no record.

    Args:
        path: the target; replaced if it exists.
        records: streamed once.
        limit: stop reading once there are so many records.

    Raises:
        RecordError: as `write_records`, or no record came.
    """
    report = FoldReport()
    first_place: dict[int, tuple[int, int]] = {}  # hash of a prompt -> (offset, length) of its first line
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}  # first line -> the later ones
    with _replacing(path) as target, tempfile.TemporaryFile(dir=_target(path).parent) as spool:
        offset = 0
        for record in records:
            key = hash(record.prompt)
            line = format_record(record).encode() + b"\n"
            place = (offset, len(line))
            first = first_place.setdefault(key, place)
            if first is not place:
                groups.setdefault(first, []).append(place)
            spool.write(line)
            offset += len(line)
            report.records += 1
            report.rejections += sum(record.rejection_counts)
            report.answers += len(record.rejected_responses)
            report.empty += record.rejected_responses.count("")
            if len(first_place) == limit:
                break
        if not report.records:
            raise RecordError("no rejected answer was found, so nothing was written")
        later = (place for places in groups.values() for place in places)
        copied = 0
        for start, length in sorted([*groups, *later]):
            _copy(spool, target, copied, start)
            copied = start + length
            if (start, length) in groups:
                lines = [_at(spool, place) for place in [(start, length), *groups[start, length]]]
                before = [parse_record(decode_json(line)) for line in lines]
                # Folding by the prompt itself, so that two prompts of one hash stay two.
                after = fold_records(before)
                for record in after:
                    target.write(format_record(record).encode() + b"\n")
                lost = _answers(before) - _answers(after)
                report.records -= len(before) - len(after)
                report.prompts_repeated += len(before) - len(after)
                report.answers -= lost
                report.answers_folded += lost
                report.empty -= _empty(before) - _empty(after)
        _copy(spool, target, copied, offset)
    return report


def _answers(records: Iterable[RejectionRecord]) -> int:
    return sum(len(record.rejected_responses) for record in records)


def _empty(records: Iterable[RejectionRecord]) -> int:
    return sum(record.rejected_responses.count("") for record in records)


def _at(file: IO[bytes], place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _copy(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(CHUNK_BYTES, end - start))
        target.write(chunk)
        start += len(chunk)


def _target(path: Path | str) -> Path:
    """The real file behind a path: replacing a link's name would leave its file as it was."""
    return Path(os.path.realpath(path))


@contextmanager
def _replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """A file under a temporary name beside the target, which takes the target's name once all is written."""
    target = _target(path)
    if target.is_dir():
        raise RecordError("is a folder: name the file to write", path=path)
    if target.exists() and not target.is_file():
        raise RecordError("is not a regular file: name the file to write", path=path)
    if not target.parent.is_dir():
        raise RecordError(f"cannot be written: create the folder {target.parent} first", path=path)
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
    try:
        try:
            file = open(temporary, "wb")  # noqa: SIM115 - only the errors of opening are caught here
        except OSError as error:
            raise RecordError(f"cannot be written: {error.strerror or error}", path=path) from error
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # gone if it took its name, and never there if it could not be opened
            temporary.unlink()
