"""Where rows come from: a JSON Lines, JSON or CSV file, a folder of bad answers, or a data set on the Hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.formats import FORMATS
from buleyean_rl.data.records import Row, SkipBad, decode_json, open_bytes, read_rows, reject_row
from buleyean_rl.data.records.files import STRICT_JSON
from buleyean_rl.data.records.record import keys_of, kind_of
from buleyean_rl.errors import RecordError

_SPACE = re.compile(r"\s*")


Placed = Iterator[tuple[int, Row]]


def open_rows(source: str, *, split: str | None = None, skip_bad: SkipBad = False) -> Placed:
    """Stream the rows of a source with their places: a file's line, or the number of a data set's row.

    Args:
        source: a .jsonl file, a .json file (a list, or an object that holds one), a .csv or .tsv file with a
            header, a folder of bad answers, or a Hub data set id.
        split: the part of a Hub data set; None takes `train`, `train_prefs`, or the only one.
        skip_bad: as in `read_records`, for rows that are no JSON object.

    Raises:
        RecordError: the source cannot be read, or a row of it.
    """
    if is_hub_id(source):
        return _hub_rows(source, split)
    if Path(source).is_dir():
        return _folder_rows(Path(source))
    if Path(source).suffix.lower() in (".csv", ".tsv"):
        return _csv_rows(source, skip_bad)
    with open_bytes(source) as file:
        head = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") or (head.startswith(b"{") and Path(source).suffix.lower() == ".json"):
        return _json_rows(source, skip_bad)
    return read_rows(source, skip_bad=skip_bad)


def is_hub_id(source: str) -> bool:
    """Whether a source means owner/name on the Hub: it looks like one, and there is no folder `owner`."""
    looks_so = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    is_file_name = Path(source).suffix.lower() in {".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt"}
    return looks_so and not is_file_name and not Path(source).parent.exists()


def _json_rows(path: str, skip_bad: SkipBad) -> Placed:
    with open_bytes(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path, line=line) from error
    del raw
    start = _skip_space(text, 0)
    if text[start] == "{":
        first_line, _, rest = text[start:].partition("\n")
        if rest.strip() and _is_object(first_line):  # JSON Lines under another name
            yield from read_rows(path, skip_bad=skip_bad)
            return
        whole, lists = _object_with_lists(text, start, path)
        if any(known.matches(whole) for known in FORMATS):
            yield 1, whole
            return
        if len(lists) != 1:
            problem = f"holds {len(lists)} lists of objects (its keys: {keys_of(whole)}); one is wanted"
            raise RecordError(problem, path=path)
        start = lists[0]
    yield from _list_rows(text, start, path, skip_bad)


def _list_rows(text: str, start: int, path: str, skip_bad: SkipBad) -> Placed:
    """The objects of the list that starts at a position, decoded one by one."""
    position = _skip_space(text, start + 1)
    line, counted = text.count("\n", 0, position) + 1, position
    if text[position : position + 1] == "]":
        raise RecordError("is an empty list: it must hold rows", path=path)
    while True:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _value(text, position, path)
        if isinstance(value, dict):
            yield line, value
        else:
            reject_row(RecordError(f"is {kind_of(value)}: each row must be an object"), path, line, skip_bad)
        position = _skip_space(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            return
        if mark != ",":
            line = text.count("\n", 0, position) + 1
            raise RecordError("is not valid JSON (the list breaks off here)", path=path, line=line)
        position = _skip_space(text, position + 1)


def _object_with_lists(text: str, start: int, path: str) -> tuple[Row, list[int]]:
    """An object, and where those of its values start that are lists of objects."""
    whole, _ = _value(text, start, path)
    lists = []
    position = _skip_space(text, start + 1)
    for value in whole.values():
        _, position = _value(text, position, path)  # the key
        position = _skip_space(text, _skip_space(text, position) + 1)  # the colon
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lists.append(position)
        _, position = _value(text, position, path)
        position = _skip_space(text, _skip_space(text, position) + 1)  # the comma
    return whole, lists


def _value(text: str, position: int, path: str) -> tuple[Any, int]:
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


def _csv_rows(path: str, skip_bad: SkipBad) -> Placed:
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
                    reject_row(RecordError(problem), path, line, skip_bad)
                else:
                    yield line, dict(row)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise RecordError(f"is not a table: {error}", path=path, line=line) from error


def _folder_rows(folder: Path) -> Placed:
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
        found = next((p for p in [path.with_suffix(".prompt.txt"), *above] if p.is_file()), None)
        if found is None:
            problem = f"has no prompt: write what was asked into {path.stem}.prompt.txt or prompt.txt beside it"
            raise RecordError(problem, path=path)
        yield number, {"prompt": _text(found), "rejected": _text(path)}


def _text(path: Path) -> str:
    with open_bytes(path) as file:
        try:
            return file.read().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error


def _hub_rows(name: str, split: str | None) -> Placed:
    import datasets

    try:
        if split is None:
            split = _main_split(datasets.get_dataset_split_names(name))
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from enumerate(rows, start=1)
    except RecordError as error:
        raise RecordError(error.problem, path=name) from error
    except Exception as error:  # the Hub's client has no one base of its errors
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"cannot be loaded from the Hub ({first_line}): check the name, the split and the network"
        raise RecordError(problem, path=name) from error


def _main_split(names: list[str]) -> str:
    for name in ("train", "train_prefs"):
        if name in names:
            return name
    if len(names) != 1:
        raise RecordError(f"has the splits {', '.join(names)}: choose one with --split")
    return names[0]
