"""Where rows come from: a JSON Lines, JSON or CSV file, a folder of bad answers, or a data set on the Hub.

source --open_rows--> numbered rows --the first of them--> their format: `open_source`
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.formats import FORMATS, detect_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Format
from buleyean_rl.data.records import Row, SkipBad, decode_json, handle_bad_row, open_bytes, read_rows, read_text
from buleyean_rl.data.records.files import STRICT_JSON
from buleyean_rl.data.records.values import describe, list_keys
from buleyean_rl.errors import RecordError

ROWS_SAMPLED = 20  # to detect the format
_SPACE = re.compile(r"\s*")

NumberedRows = Iterator[tuple[int, Row]]  # a file's line, or a data set's row, counted from 1


def open_source(
    source: str,
    row_format: Format | None,
    choices: Choices = NO_CHOICES,
    split: str | None = None,
    skip_bad: SkipBad = False,
) -> tuple[Format, NumberedRows]:
    """The rows of a source, and the format they are in.

    Args:
        source: see `open_rows`.
        row_format: None detects it from the first rows.
        choices: the user's reading of the rows.
        split: see `open_rows`.
        skip_bad: see `open_rows`.

    Raises:
        RecordError: the source cannot be read, or is in no known format.
    """
    rows = open_rows(source, split=split, skip_bad=skip_bad)
    if row_format is not None:
        return row_format, rows
    sample = list(islice(rows, ROWS_SAMPLED))
    try:
        detected = detect_format([row for _, row in sample], choices)
    except RecordError as error:
        raise RecordError(error.problem, path=source) from error
    return detected, chain(sample, rows)


def open_rows(source: str, *, split: str | None = None, skip_bad: SkipBad = False) -> NumberedRows:
    """Stream the rows of a source with their numbers.

    Args:
        source: a .jsonl file, a .json file (a list, or an object that holds one), a .csv or .tsv file with a
            header, a folder of bad answers, or a Hub data set id.
        split: the part of a Hub data set; None takes `train`, `train_prefs`, or the only one.
        skip_bad: as in `read_records`, for rows that are no JSON object.

    Raises:
        RecordError: the source cannot be read, or a row of it.
    """
    if is_hub_id(source):
        return _read_hub(source, split)
    if Path(source).is_dir():
        return _read_folder(Path(source))
    if Path(source).suffix.lower() in (".csv", ".tsv"):
        return _read_table(source, skip_bad)
    with open_bytes(source) as file:
        head = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") or (head.startswith(b"{") and Path(source).suffix.lower() == ".json"):
        return _read_json(source, skip_bad)
    return read_rows(source, skip_bad=skip_bad)


def is_hub_id(source: str) -> bool:
    """Whether a source means owner/name on the Hub: it looks like one, and there is no folder `owner`."""
    is_owner_and_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    is_file_name = Path(source).suffix.lower() in {".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt"}
    return is_owner_and_name and not is_file_name and not Path(source).parent.exists()


def _read_json(path: str, skip_bad: SkipBad) -> NumberedRows:
    text = read_text(path)
    start = _skip_space(text, 0)
    if text[start] == "{":
        first_line, _, later_lines = text[start:].partition("\n")
        if later_lines.strip() and _is_object(first_line):  # JSON Lines under another name
            yield from read_rows(path, skip_bad=skip_bad)
            return
        value, list_starts = _find_lists(text, start, path)
        if any(format.matches(value) for format in FORMATS):
            yield 1, value
            return
        if len(list_starts) != 1:
            problem = f"holds {len(list_starts)} lists of objects (its keys: {list_keys(value)}); one is wanted"
            raise RecordError(problem, path=path)
        start = list_starts[0]
    yield from _read_list(text, start, path, skip_bad)


def _read_list(text: str, start: int, path: str, skip_bad: SkipBad) -> NumberedRows:
    """The objects of the list that starts at a position, decoded one by one."""
    position = _skip_space(text, start + 1)
    line, counted = text.count("\n", 0, position) + 1, position
    if text[position : position + 1] == "]":
        raise RecordError("is an empty list: it must hold rows", path=path)
    while True:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode_value(text, position, path)
        if isinstance(value, dict):
            yield line, value
        else:
            handle_bad_row(RecordError(f"is {describe(value)}: each row must be an object"), path, line, skip_bad)
        position = _skip_space(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            return
        if mark != ",":
            line = text.count("\n", 0, position) + 1
            raise RecordError("is not valid JSON (the list breaks off here)", path=path, line=line)
        position = _skip_space(text, position + 1)


def _find_lists(text: str, start: int, path: str) -> tuple[Row, list[int]]:
    """An object, and where those of its values start that are lists of objects."""
    outer, _ = _decode_value(text, start, path)
    list_starts = []
    position = _skip_space(text, start + 1)
    for value in outer.values():
        _, position = _decode_value(text, position, path)  # the key
        position = _skip_space(text, _skip_space(text, position) + 1)  # the colon
        if isinstance(value, list) and value and isinstance(value[0], dict):
            list_starts.append(position)
        _, position = _decode_value(text, position, path)
        position = _skip_space(text, _skip_space(text, position) + 1)  # the comma
    return outer, list_starts


def _decode_value(text: str, position: int, path: str) -> tuple[Any, int]:
    try:
        return STRICT_JSON.raw_decode(text, position)
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON ({error.msg} at column {error.colno})"
        raise RecordError(problem, path=path, line=error.lineno) from error
    except (RecursionError, ValueError) as error:
        line = text.count("\n", 0, position) + 1
        raise RecordError(f"is not valid JSON: {error}", path=path, line=line) from error


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _is_object(line: str) -> bool:
    try:
        return isinstance(decode_json(line), dict)
    except RecordError:
        return False


def _read_table(path: str, skip_bad: SkipBad) -> NumberedRows:
    """The rows of a table as objects, by the names in its first row; places are the lines where rows begin."""
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = None
        try:
            header = text.readline()
            text.seek(0)
            delimiter = max("\t,;|", key=header.count) if header.strip() else ","
            csv.field_size_limit(1 << 24)
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise RecordError("has two columns of one name: rename one", path=path, line=1)
            line = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    problem = f"has not {len(names)} cells as the first row has: quote cells that hold a {delimiter!r}"
                    handle_bad_row(RecordError(problem), path, line, skip_bad)
                else:
                    yield line, dict(row)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise RecordError(f"is not a table: {error}", path=path, line=line) from error


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
            split = _choose_split(datasets.get_dataset_split_names(name))
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from enumerate(rows, start=1)
    except RecordError as error:
        raise RecordError(error.problem, path=name) from error
    except Exception as error:  # the Hub's client has no one base of its errors
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"cannot be loaded from the Hub ({first_line}): check the name, the split and the network"
        raise RecordError(problem, path=name) from error


def _choose_split(names: list[str]) -> str:
    for name in ("train", "train_prefs"):
        if name in names:
            return name
    if len(names) != 1:
        raise RecordError(f"has the splits {', '.join(names)}: choose one with --split")
    return names[0]
