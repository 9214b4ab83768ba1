"""One visit to a source: what is new joins the rows, and the rows become records.

cursor.json   where the next visit begins; written last, so that a visit that was killed is made again
rows.jsonl    what was fetched
records.jsonl what `train` takes
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers import Choices, import_records
from buleyean_rl.data.importers.protocol import NO_CHOICES
from buleyean_rl.data.importers.run import ImportReport
from buleyean_rl.errors import NothingRejected, UsageError
from buleyean_rl.live.connect.langfuse import VARIABLE as LANGFUSE_VARIABLE
from buleyean_rl.live.connect.langfuse import Langfuse
from buleyean_rl.live.connect.langsmith import VARIABLE as LANGSMITH_VARIABLE
from buleyean_rl.live.connect.langsmith import LangSmith
from buleyean_rl.live.connect.local import LocalLog
from buleyean_rl.live.connect.open_webui import VARIABLE as OPEN_WEBUI_VARIABLE
from buleyean_rl.live.connect.open_webui import OpenWebUI
from buleyean_rl.live.connect.source import Fetched, Source
from buleyean_rl.live.keys import find_key
from buleyean_rl.system.files import read_json_object, write_json
from buleyean_rl.system.outputs import claim_folder

CURSOR, ROWS, RECORDS = "cursor.json", "rows.jsonl", "records.jsonl"
SERVICES: dict[str, tuple[Callable[[str, str], Source], str]] = {
    "openwebui": (OpenWebUI, OPEN_WEBUI_VARIABLE),
    "langfuse": (Langfuse, LANGFUSE_VARIABLE),
    "langsmith": (LangSmith, LANGSMITH_VARIABLE),
}


@dataclass(frozen=True)
class ImportSettings:
    """How rows are read. See `data.importers.import_records`.

    Args:
        choices: the user's reading of rows that are ambiguous.
        redact: take e-mail addresses, phone numbers and keys out.
        keep_accepted: keep accepted answers, as anchors; None for the format's own.
    """

    choices: Choices = NO_CHOICES
    redact: bool = False
    keep_accepted: bool | None = None


@dataclass(frozen=True)
class Visit:
    """What came of a visit.

    Args:
        is_new: whether anything has changed since the one before.
        records: path of the records; None where nothing was rejected yet.
        report: of the import; None where there was none.
        remark: for people: why there are no records.
    """

    is_new: bool
    records: Path | None
    report: ImportReport | None = None
    remark: str = ""


def is_service(name: str) -> bool:
    """Whether a source's name is that of a service: `openwebui:`, `langfuse:` or `langsmith:` and a URL."""
    kind, _, url = name.partition(":")
    return kind in SERVICES and url.startswith(("http://", "https://"))


def open_source(name: str, key_file: Path | None = None) -> Source:
    """A source by its name.

    Args:
        name: of a service, see `is_service`, or the path of a file or folder.
        key_file: holds the key; None for the environment.

    Raises:
        UsageError: there is no such source, or its key is missing.
    """
    if not is_service(name):
        return LocalLog(Path(name))
    kind, _, url = name.partition(":")
    service, variable = SERVICES[kind]
    return service(url, find_key(variable, key_file))


def sync(name: str, folder: Path, settings: ImportSettings, key_file: Path | None = None) -> Visit:
    """Visit a source, and bring a folder up to date.

    Args:
        name: see `open_source`.
        folder: the source's own; made if it is not there.
        settings: how rows are read.
        key_file: see `open_source`.

    Raises:
        UsageError: the folder is another source's, or see `open_source`.
        EngineError: the source does not answer, or answers otherwise than it should.
        RecordError: its rows cannot be read.
    """
    if not is_service(name) and folder.resolve().is_relative_to(Path(name).resolve()):
        raise UsageError(f"{folder} is in {name}, whose files are read: name a folder outside")
    with claim_folder(folder, lambda path: (path / CURSOR).exists(), "source"):
        state = read_json_object(folder / CURSOR) or {"source": name, "cursor": {}}
        if state.get("source") != name:
            raise UsageError(f"{folder} is of {state.get('source')}: name another folder")
        if not (folder / CURSOR).exists():
            write_json(folder / CURSOR, state)
        folder.chmod(0o700)
        source = open_source(name, key_file)
        fetched = asyncio.run(_fetch(source, folder / ROWS, state["cursor"]))
        records = folder / RECORDS
        reading = asdict(settings)
        is_read_so = state.get("reading", reading) == reading  # otherwise the same rows are other records
        if fetched.cursor is None and (is_read_so or not fetched.path.exists()):
            return Visit(False, records if records.exists() else None)
        visit = _import(source.format, fetched.path, records, name, settings)
        write_json(folder / CURSOR, state | {"cursor": fetched.cursor or state["cursor"], "reading": reading})
        return visit


def fetch_rows(name: str, rows: Path, key_file: Path | None = None) -> str:
    """Write all rows of a source to a file.

    Args:
        name: of a service, see `is_service`.
        rows: the file.
        key_file: see `open_source`.

    Returns:
        Their format.
    """
    source = open_source(name, key_file)
    asyncio.run(_fetch(source, rows, {}))
    return source.format


async def _fetch(source: Source, rows: Path, cursor: dict[str, Any]) -> Fetched:
    try:
        return await source.fetch(rows, cursor)
    finally:
        await source.close()


def _import(format: str, rows: Path, records: Path, name: str, settings: ImportSettings) -> Visit:
    if rows.is_file() and not rows.stat().st_size:
        return Visit(True, None, remark=f"{name} has no rated answer yet")
    try:
        report = import_records(
            str(rows),
            records,
            format=format,
            skip_bad=True,
            choices=settings.choices,
            redact=settings.redact,
            keep_accepted=settings.keep_accepted,
        )
    except NothingRejected as error:
        if error.skipped and records.exists():  # another schema: what was read before stays
            raise
        records.unlink(missing_ok=True)  # of ratings that were taken back
        return Visit(True, None, remark=f"{name} {error.problem}")
    return Visit(True, records, replace(report, source=name))
