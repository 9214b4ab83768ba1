"""Where rows come from: a file, a folder of bad answers, a saved data set, or a data set on the Hub.

source --open_rows--> numbered rows --the first of them--> their format: `open_source`
"""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path

from buleyean_rl.data.importers.arrow_files import (
    choose_split,
    is_arrow_file,
    is_saved_dataset,
    read_arrow,
    read_saved_dataset,
)
from buleyean_rl.data.importers.expand import TABLE_SUFFIXES, is_hub_id
from buleyean_rl.data.importers.formats import detect_format
from buleyean_rl.data.importers.json_files import NumberedRows, read_json
from buleyean_rl.data.importers.names import simplify_names
from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Format
from buleyean_rl.data.importers.tables import read_table
from buleyean_rl.data.importers.text_files import open_text
from buleyean_rl.data.records import Row, SkipBad, read_text
from buleyean_rl.errors import RecordError

ROWS_SAMPLED = 20  # to detect the format


def open_source(
    source: str,
    row_format: Format | None,
    choices: Choices = NO_CHOICES,
    split: str | None = None,
    skip_bad: SkipBad = False,
    encoding: str | None = None,
) -> tuple[Format, NumberedRows]:
    """The rows of a source, and the format they are in.

    Args:
        source: see `open_rows`.
        row_format: None detects it from the first rows.
        choices: the user's reading of the rows.
        split: see `open_rows`.
        skip_bad: see `open_rows`.
        encoding: see `open_rows`.

    Raises:
        RecordError: the source cannot be read, or is in no known format.
    """
    rows = open_rows(source, split=split, skip_bad=skip_bad, encoding=encoding)
    if row_format is not None:
        return row_format, _rename(rows, row_format)
    try:
        sample = list(islice(rows, ROWS_SAMPLED))
        detected = detect_format([row for _, row in sample], choices)
    except RecordError as error:
        rows.close()
        raise RecordError(error.problem, path=error.path or source, line=error.line) from error
    return detected, _rename(_chain(sample, rows), detected)


def _rename(rows: NumberedRows, row_format: Format) -> NumberedRows:
    """The rows, with simplified names where only by these they are in the format; closing it closes the source."""
    with closing(rows):
        for number, row in rows:
            if row_format.matches(row) or not row_format.matches(simplified := simplify_names(row)):
                yield number, row
            else:
                yield number, simplified


def _chain(sample: list[tuple[int, Row]], rows: NumberedRows) -> NumberedRows:
    """The rows that were read ahead, and those after them; closing it closes the source."""
    with closing(rows):
        yield from sample
        yield from rows


def open_rows(
    source: str, *, split: str | None = None, skip_bad: SkipBad = False, encoding: str | None = None
) -> NumberedRows:
    """Stream the rows of a source with their numbers.

    Args:
        source: a file of JSON (an object a line, lists, objects that hold one list), CSV, TSV, Parquet or Arrow, of
            the text ones also packed as .gz or .zst; a folder of bad answers, or one of `save_to_disk`; a Hub data set
            id.
        split: the part of a data set; None takes `train`, `train_prefs`, or the only one.
        skip_bad: as in `read_records`, for rows that are no JSON object.
        encoding: of a text file that is not UTF-8.

    Raises:
        RecordError: the source cannot be read, or a row of it.
        UsageError: no such encoding.
    """
    if is_hub_id(source):
        return _read_hub(source, split)
    if Path(source).is_dir():
        folder = Path(source)
        return read_saved_dataset(folder, split) if is_saved_dataset(folder) else _read_folder(folder)
    return _read_file(source, skip_bad, encoding)


def _read_file(path: str, skip_bad: SkipBad, encoding: str | None) -> NumberedRows:
    if Path(path).is_file() and is_arrow_file(_read_head(path), path):
        yield from read_arrow(path)
        return
    with open_text(path, encoding) as file:
        is_table = not {suffix.lower() for suffix in Path(path).suffixes[-2:]}.isdisjoint(TABLE_SUFFIXES)
        yield from (read_table if is_table else read_json)(file, path, skip_bad)


def _read_head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error


def _read_folder(folder: Path) -> NumberedRows:
    """Every text file of a folder as a bad answer to the prompt beside it: `NAME.prompt.txt`, or `prompt.txt`
    there or further up.
    """
    answers = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".txt", ".md")
        and path.is_file()
        and path.name != "prompt.txt"
        and not path.name.endswith(".prompt.txt")
    ]
    if not answers:
        raise RecordError("holds no .txt or .md file: put one bad answer into each", path=folder)
    for number, path in enumerate(answers, start=1):
        above = [parent / "prompt.txt" for parent in path.parents if parent == folder or folder in parent.parents]
        prompt = next((file for file in [path.with_suffix(".prompt.txt"), *above] if file.is_file()), None)
        if prompt is None:
            problem = f"has no prompt: write what was asked into {path.stem}.prompt.txt or prompt.txt beside it"
            raise RecordError(problem, path=path)
        yield number, {"prompt": read_text(prompt).strip(), "rejected": read_text(path).strip()}


def _read_hub(name: str, split: str | None) -> NumberedRows:
    import datasets

    try:
        if split is None:
            split = choose_split(datasets.get_dataset_split_names(name), None, name)
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from enumerate(rows, start=1)
    except RecordError:
        raise
    except Exception as error:  # the Hub's client has no one base of its errors
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"cannot be loaded from the Hub ({first_line}): check the name, the split and the network"
        raise RecordError(problem, path=name) from error
