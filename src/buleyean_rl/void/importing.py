"""Read an uploaded file in a process of its own, within bounds: whatever is in it, the page goes on.

    upload --child: import_records--> rows of the store, in a file --parent--> the store

The child may take so many seconds and so much memory; the parent only copies rows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from buleyean_rl.data.records.values import replace_lone_surrogates
from buleyean_rl.errors import BuleyeanError, RecordError
from buleyean_rl.system.files import temporary_folder
from buleyean_rl.void.store import Row

MAX_SECONDS = 60
MAX_MEMORY = 2 << 30
MAX_ANSWERS = 100_000  # in one import: the store is locked while they go in
MAX_CELL = 80  # characters of a cell that is shown


class UnreadableFile(BuleyeanError):
    """An uploaded file that is not imported.

    Args:
        problem: what is wrong and what to do.
        columns: its columns, where naming some would make it readable.
        sample: cells of the first rows, by column.
    """

    def __init__(self, problem: str, columns: list[str] | None = None, sample: list[Row] | None = None) -> None:
        super().__init__(problem)
        self.columns, self.sample = columns or [], sample or []


@dataclass(frozen=True)
class ImportedRows:
    """What is in an uploaded file.

    Args:
        format: that it was read as.
        records: prompts in it.
        notes: what was left out, and how much of it.
        rows: see `store.rejections.record_rows`; read from a file.
    """

    format: str
    records: int
    notes: list[str]
    rows: Iterator[Row] = field(repr=False)


class Importer:
    """Reads uploaded files, one at a time, each in a process of its own.

    Args:
        scratch: folder for temporary files.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._lock, self._idle = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @contextmanager
    def read_upload(
        self, content: bytes, name: str, columns: Mapping[str, str], below: float | None
    ) -> Iterator[ImportedRows]:
        """The rejections in an uploaded file.

        Args:
            content: of the file.
            name: of the file, whose ending tells a table from JSON.
            columns: role -> column, for a table of the user's own; see `Choices`.
            below: a score below it is a rejection; None for the importers' own.

        Raises:
            UnreadableFile: it cannot be imported, or not within the bounds; or the server ends.
            OSError: the disk is full.
        """
        with self._idle, temporary_folder(self._scratch / "import") as folder:
            source = folder / _safe_name(name)
            source.write_bytes(content)
            choices: Row = {"columns": dict(columns)} | ({} if below is None else {"below": below})
            reply = self._run({"source": str(source), "folder": str(folder), "choices": choices})
            if "errno" in reply:
                raise OSError(reply["errno"], reply["problem"])
            if "problem" in reply:
                raise UnreadableFile(reply["problem"], reply.get("columns"), reply.get("sample"))
            with (folder / "rows").open(encoding="utf-8") as file:
                yield ImportedRows(reply["format"], reply["records"], reply["notes"], map(json.loads, file))

    def close(self) -> None:
        """End what is under way; nothing of it is imported, unless it is being stored already."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        with self._idle:  # its folder is deleted
            pass

    def _run(self, task: Row) -> Row:
        """What the child makes of a file."""
        with self._lock:
            if self._closed:
                raise UnreadableFile(_SERVER_ENDS)
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(task)], stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL
            )
        with self._process as process:
            try:
                out, err = process.communicate(timeout=MAX_SECONDS)
            except subprocess.TimeoutExpired:
                raise UnreadableFile(f"takes more than {MAX_SECONDS} seconds to read: {_IN_PARTS}") from None
            finally:
                process.kill()
        with self._lock:
            self._process = None
            if self._closed:
                raise UnreadableFile(_SERVER_ENDS)
        return _decode_reply(process.returncode, out, err)


_SERVER_ENDS = "is not imported: the server ends; import it again"
_IN_PARTS = "import it in parts, or clean it with `buleyean data import` first"


def _safe_name(name: str) -> str:
    """A file name with the endings of the upload's; those the importers do not know are JSON Lines."""
    return "upload" + "".join(re.findall(r"\.[a-z0-9]{1,8}", Path(name[-64:]).name.lower())[-2:])


def _decode_reply(code: int, out: bytes, err: bytes) -> Row:
    try:
        return dict(json.loads(out))
    except ValueError:
        lines = err.decode(errors="replace").strip().splitlines()
        if code < 0 or any("MemoryError" in line for line in lines[-1:]):
            return {"problem": f"takes more than {MAX_MEMORY >> 30} GB of memory to read: {_IN_PARTS}"}
        return {"problem": f"cannot be read: {lines[-1][:200] if lines else 'the importer ended without a message'}"}


def child(task: Row) -> None:
    """Read the file, write its rows, and print a reply.

    Args:
        task: source, folder and choices.
    """
    _limit_memory()
    reply_out, sys.stdout = sys.stdout, sys.stderr  # stdout carries the reply alone
    try:
        reply = _import(Path(task["source"]), Path(task["folder"]), task["choices"])
    except RecordError as error:
        where = f"line {error.line}: " if error.line is not None else ""
        reply = {"problem": where + error.problem}
    except UnreadableFile as error:
        reply = {"problem": str(error), "columns": error.columns, "sample": error.sample}
    except BuleyeanError as error:
        reply = {"problem": str(error)}
    except OSError as error:
        reply = {"problem": str(error), "errno": error.errno}
    reply_out.buffer.write(replace_lone_surrogates(json.dumps(reply, ensure_ascii=False)).encode())
    reply_out.flush()


def _import(source: Path, folder: Path, values: Row) -> Row:
    from buleyean_rl.data.importers import import_records
    from buleyean_rl.data.importers.formats import detect_format
    from buleyean_rl.data.importers.protocol import Choices
    from buleyean_rl.data.importers.sources import ROWS_SAMPLED, open_rows
    from buleyean_rl.data.records import read_records
    from buleyean_rl.void.store.rejections import record_rows

    choices = Choices(**values)
    sample = [row for _, row in islice(open_rows(str(source)), ROWS_SAMPLED)]
    try:
        detect_format(sample, choices)
    except RecordError as error:
        raise UnreadableFile(error.problem, *_columns(sample)) from error
    output = folder / "records.jsonl"
    report = import_records(str(source), output, choices=choices)
    if report.answers + report.accepted > MAX_ANSWERS:
        raise UnreadableFile(f"holds more than {MAX_ANSWERS:,} answers: {_IN_PARTS}")
    with (folder / "rows").open("w", encoding="utf-8") as file:
        for record in read_records(output):
            for row in record_rows(record):
                file.write(json.dumps(row) + "\n")
    notes = [line.strip() for line in report.lines()[1:]]
    return {"format": report.format, "records": report.records, "notes": notes}


def _columns(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """The columns that may be named: those with text or numbers in them."""
    columns = [name for name, value in (rows[0] if rows else {}).items() if not isinstance(value, dict | list)]
    return columns, [{name: str(row.get(name, ""))[:MAX_CELL] for name in columns} for row in rows[:3]]


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    # of what is written to: pyarrow alone maps 1.6 GB of addresses
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY if most < 0 else min(MAX_MEMORY, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
