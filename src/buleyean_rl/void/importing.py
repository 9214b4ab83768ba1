"""Read an uploaded file in a process of its own, within bounds: whatever is in it, the page goes on.

    upload --child: import_records--> a preview: rows of the store, in a file --taken--> the store

The child may take so many seconds and so much memory; the parent only copies rows. A preview that is neither taken nor
dropped is forgotten when the server ends, or when others have come after it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from buleyean_rl.data.records.values import replace_lone_surrogates
from buleyean_rl.errors import BuleyeanError, RecordError
from buleyean_rl.system.files import temporary_folder
from buleyean_rl.system.module_process import module_command, module_environment
from buleyean_rl.void.store import ImportedFile, Row

MAX_SECONDS = 60
MAX_MEMORY = 2 << 30
MAX_ANSWERS = 100_000  # in one import: the store is locked while they go in
MAX_CELL = 80  # characters of a cell that is shown
SHOWN, MAX_SHOWN = 3, 500  # rejections of a preview, and characters of each text
MAX_PREVIEWS = 4
ROWS = "rows"


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
class Preview:
    """What is in an uploaded file.

    Args:
        file: the file.
        format: that it was read as.
        records: prompts in it.
        rejections: answers in it that are rejected.
        notes: what is left out, and how much of it.
        sample: the first rejections.
        columns: of a table.
        folder: of its rows.
        opened: deletes the folder.
    """

    file: ImportedFile
    format: str
    records: int
    rejections: int
    notes: list[str]
    sample: list[Row]
    columns: list[str]
    folder: Path
    opened: ExitStack

    def rows(self) -> Iterator[Row]:
        """See `store.rejections.record_rows`; read from a file."""
        with (self.folder / ROWS).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


class Importer:
    """Reads uploaded files, one at a time, each in a process of its own.

    Args:
        scratch: folder for temporary files.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._lock, self._idle = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._previews: dict[str, Preview] = {}
        self._closed = False

    def read_upload(
        self, content: bytes, file: ImportedFile, columns: Mapping[str, str], below: float | None
    ) -> Preview:
        """Look into an uploaded file; see `preview`.

        Args:
            content: of the file.
            file: its name's ending tells a table from JSON.
            columns: role -> column, for a table of the user's own; see `Choices`.
            below: a score below it is a rejection; None for the importers' own.

        Raises:
            UnreadableFile: it cannot be imported, or not within the bounds; or the server ends.
            OSError: the disk is full.
        """
        with self._idle, ExitStack() as opened:
            folder = opened.enter_context(temporary_folder(self._scratch / "import"))
            source = folder / _safe_name(file.name)
            source.write_bytes(content)
            choices: Row = {"columns": dict(columns)} | ({} if below is None else {"below": below})
            reply = self._run({"source": str(source), "folder": str(folder), "choices": choices})
            if "errno" in reply:
                raise OSError(reply["errno"], reply["problem"])
            if "problem" in reply:
                raise UnreadableFile(reply["problem"], reply.get("columns"), reply.get("sample"))
            self.drop(file.uid)
            for uid in list(self._previews)[: 1 - MAX_PREVIEWS]:
                self.drop(uid)
            preview = self._previews[file.uid] = Preview(file=file, folder=folder, opened=opened.pop_all(), **reply)
            return preview

    def read_prompts(self, content: bytes, name: str) -> list[str]:
        """The prompts in an uploaded file.

        Raises:
            UnreadableFile: see `read_upload`.
            OSError: the disk is full.
        """
        with self._idle, temporary_folder(self._scratch / "import") as folder:
            source = folder / _safe_name(name, ".txt")
            source.write_bytes(content)
            reply = self._run({"source": str(source), "folder": str(folder)})
            if "problem" in reply:
                raise UnreadableFile(reply["problem"])
            return list(reply["prompts"])

    def preview(self, uid: str) -> Preview | None:
        """A preview that is neither taken nor dropped; None of another."""
        return self._previews.get(uid)

    def drop(self, uid: str) -> None:
        """Forget a preview."""
        preview = self._previews.pop(uid, None)
        if preview is not None:
            preview.opened.close()

    def close(self) -> None:
        """End what is under way; nothing of it is imported, unless it is being stored already."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        with self._idle:  # its folder is deleted
            for uid in list(self._previews):
                self.drop(uid)

    def _run(self, task: Row) -> Row:
        """What the child makes of a file."""
        with self._lock:
            if self._closed:
                raise UnreadableFile(_SERVER_ENDS)
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                module_command(__name__, json.dumps(task)),
                env=module_environment(),
                stdout=pipe,
                stderr=pipe,
                stdin=subprocess.DEVNULL,
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


def _safe_name(name: str, default: str = "") -> str:
    """A file name with the endings of the upload's; those the importers do not know are JSON Lines."""
    return "upload" + "".join(re.findall(r"\.[a-z0-9]{1,8}", Path(name[-64:]).name.lower())[-2:] or [default])


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
        task: source, folder and choices; without choices, it holds prompts.
    """
    _limit_memory()
    reply_out, sys.stdout = sys.stdout, sys.stderr  # stdout carries the reply alone
    try:
        source = Path(task["source"])
        reply = _import(source, Path(task["folder"]), task["choices"]) if "choices" in task else _prompts(source)
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
    from buleyean_rl.void.store.rejections import record_rows, text_of_prompt

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
    rejections, shown = 0, list[Row]()
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for record in read_records(output):
            for row in record_rows(record):
                file.write(json.dumps(row) + "\n")
                rejections += row["count"] > 0
                if row["count"] and len(shown) < SHOWN:
                    prompt = text_of_prompt(row["prompt"])[:MAX_SHOWN]
                    shown.append({"prompt": prompt, "answer": row["answer"][:MAX_SHOWN]})
    output.unlink()
    source.unlink()
    return {
        "format": report.format,
        "records": report.records,
        "rejections": rejections,
        "notes": [line.strip() for line in report.lines()[1:]],
        "sample": shown,
        "columns": _columns(sample)[0] if source.suffix in (".csv", ".tsv", ".parquet") else [],
    }


def _prompts(source: Path) -> Row:
    from buleyean_rl.data.prompts import read_prompts

    prompts = [prompt if isinstance(prompt, str) else prompt[-1][1] for prompt in read_prompts(source)]
    return {"prompts": prompts}


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
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY if hard < 0 else min(MAX_MEMORY, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
