"""Rows of tables: CSV and TSV with any delimiter, as spreadsheets, pandas and Langfuse write them."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.json_files import NumberedRows
from buleyean_rl.data.importers.literals import parse_literal
from buleyean_rl.data.importers.names import simplify_name
from buleyean_rl.data.importers.text_files import NOT_UTF8
from buleyean_rl.data.records import SkipBad, handle_bad_row
from buleyean_rl.errors import RecordError
from buleyean_rl.system.wording import counted

DELIMITERS = ",;\t|"
MAX_CELL = 1 << 24  # characters
MAX_HEADER = 1 << 20
# Columns whose cells are lists or objects, as JSON or as pandas prints them.
# fmt: off
JSON_COLUMNS = frozenset([
    "candidates", "completions", "responses", "scores", "rejected_responses", "rejectedResponses",
    "rejection_counts", "rejectionCounts", "rejected_spans", "rejectedSpans", "rounds", "history", "chat_history",
    "feedback", "feedback_stats", "inputs", "outputs", "tools",
])
# fmt: on
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)  # Excel's


def read_table(file: io.BufferedReader[Any], path: str, skip_bad: SkipBad) -> NumberedRows:
    """The rows of a table as objects, by the names in its first row; places are the lines where rows begin.

    Args:
        file: UTF-8, as `open_text` gives it.
        path: for errors; of several delimiters that fit, `.tsv` takes the tab.
        skip_bad: as in `read_records`, for rows with too many or too few cells.
    """
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    lines = _Lines(text)
    try:
        yield from _read_rows(lines, path, skip_bad)
    except UnicodeDecodeError as error:
        raise RecordError(NOT_UTF8, path=path) from error
    except csv.Error as error:
        raise RecordError(f"is not a table: {error}", path=path, line=max(1, lines.number)) from error
    finally:
        text.detach()


class _Lines:
    """The lines of a text, counted; some of them can be looked at first."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._ahead: deque[str] = deque()
        self.number = 0

    def peek(self, characters: int) -> Sequence[str]:
        """The next lines, as many as have so many characters."""
        size = sum(map(len, self._ahead))
        while size < characters and (line := self._text.readline()):
            self._ahead.append(line)
            size += len(line)
        return self._ahead

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._text.readline()
        if not line:
            raise StopIteration
        self.number += 1
        return line


def _read_rows(lines: _Lines, path: str, skip_bad: SkipBad) -> NumberedRows:
    csv.field_size_limit(MAX_CELL)
    head = lines.peek(MAX_HEADER)
    separator = _SEPARATOR_LINE.fullmatch(head[0]) if head else None
    if separator is not None:
        next(lines)
    delimiter = separator[1] if separator is not None else _choose_delimiter(head, Path(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names = [" ".join(name.split()) or f"column {k}" for k, name in enumerate(next(reader, []), start=1)]
    if len(set(names)) < len(names):
        raise RecordError("has two columns of one name: rename one", path=path, line=1)
    simple_names = set(map(simplify_name, names))
    is_log = {"input", "output"} <= simple_names and "instruction" not in simple_names
    line = lines.number + 1
    for cells in reader:
        if not any(cell.strip() for cell in cells):  # spreadsheets end with such rows
            pass
        elif len(cells) == len(names):
            yield line, {name: _parse_cell(name, cell, is_log) for name, cell in zip(names, cells, strict=True)}
        else:
            cell_count = counted(len(cells), "cell")
            problem = f"has {cell_count}, and the first row {len(names)}: quote cells that hold a {delimiter!r}"
            handle_bad_row(RecordError(problem), path, line, skip_bad)
        line = lines.number + 1


def _choose_delimiter(head: Sequence[str], path: Path) -> str:
    """The delimiter by which the first two rows have the same number of cells, and the most."""

    def count_cells(delimiter: str) -> tuple[bool, int, bool]:
        try:
            rows = list(islice(csv.reader(head, delimiter=delimiter, strict=True), 2))
        except csv.Error:
            return False, 0, False
        same = len({len(row) for row in rows}) == 1
        return same and len(rows[0]) > 1, len(rows[0]) if rows else 0, delimiter == "\t" and ".tsv" in path.suffixes

    return max(DELIMITERS, key=count_cells)


def _parse_cell(name: str, cell: str, is_log: bool) -> Any:
    """A cell as it is, or the list or object that it spells out where its column holds such."""
    if not JSON_COLUMNS.isdisjoint((name, simplify_name(name))) or is_log:
        value = parse_literal(cell)
        if value is not None and (isinstance(value, str) <= is_log):
            return value
    return cell
