"""One rejection, as a person gives it: which part is wrong, and a line more in a records file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from buleyean_rl.data.records.answers import Span
from buleyean_rl.data.records.files import format_record, read_records
from buleyean_rl.data.records.record import RejectionRecord
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.locks import lock_file
from buleyean_rl.system.outputs import check_output_file, is_stream

_BETWEEN_WORDS = r"[\s*_`~#>|-]+"  # as they are read: line breaks and the marks of Markdown are not seen


def find_part(text: str, words: str) -> Span | None:
    """Where words stand in an answer, whatever their case and the line breaks and marks between them.

    Args:
        text: the answer.
        words: as a person read them.

    Returns:
        The first [start, end) characters; None where they stand nowhere.
    """
    pattern = _BETWEEN_WORDS.join(map(re.escape, words.split()))
    match = re.search(pattern, text, re.IGNORECASE) if pattern else None
    return match and match.span()


def check_appendable(path: Path) -> None:
    """Refuse a file that records cannot be added to.

    Raises:
        UsageError: it cannot be written, or is no records file.
    """
    if is_stream(path):
        raise UsageError(f"{path} is not a regular file: name the file to write")
    check_output_file(path, overwrite=True)
    if path.exists() and path.stat().st_size:
        try:
            next(iter(read_records(path)))
        except RecordError as error:
            raise UsageError(f"{path} is no records file, and stays as it is: name another ({error.problem})") from None


def append_record(path: Path, record: RejectionRecord, remark: str = "") -> None:
    """Add a record to a records file, which is made if there is none. The line is there as a whole or not at all.

    Args:
        path: the file.
        record: to add.
        remark: for people: why it was rejected.

    Raises:
        UsageError: it is no records file, or another process has it.
        OSError: it cannot be written.
    """
    check_appendable(path)
    line = format_record(record)
    if remark:
        line = f'{line[:-1]}, "remark": {json.dumps(remark, ensure_ascii=False)}}}'
    with name_full_disk(path), path.open("a+b") as file:
        lock_file(file, path)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        try:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.truncate(path, size)
            raise
