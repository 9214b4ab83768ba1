"""Rows of JSON: an object a line, in lists, one after another however they are printed, or all of these in one file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Generator
from typing import Any

from buleyean_rl.data.importers.formats import FORMATS
from buleyean_rl.data.importers.rows import PROMPT_KEYS
from buleyean_rl.data.importers.text_files import decode_utf8, read_to_end
from buleyean_rl.data.records import Row, SkipBad, decode_json, handle_bad_row
from buleyean_rl.data.records.files import LENIENT_JSON
from buleyean_rl.data.records.messages import is_message
from buleyean_rl.data.records.values import describe, list_keys
from buleyean_rl.errors import RecordError

NumberedRows = Generator[tuple[int, Row], None, None]  # a file's line, or a data set's row, counted from 1
MAX_DAMAGED = 100  # values over several lines that may break off, before only single lines are read
_SPACE = re.compile(r"\s*")


def read_json(file: io.BufferedReader[Any], path: str, skip_bad: SkipBad) -> NumberedRows:
    """Every object of a file of JSON values, streamed as long as each stands on a line of its own.

    Args:
        file: UTF-8, as `open_text` gives it.
        path: for errors.
        skip_bad: as in `read_records`, for what is no JSON, or no object.
    """
    empty = True
    for number, raw in enumerate(file, start=1):
        if raw.isspace():
            continue
        try:
            if raw.lstrip().startswith(b"[") or (empty and not file.peek(1)):
                raise _SeveralLines
            value = _decode_line(raw)
        except _SeveralLines:
            text = decode_utf8(raw + read_to_end(file, path), path, number)
            yield from _Values(text, number, path, skip_bad).read()
            return
        except RecordError as error:
            empty = False
            handle_bad_row(error, path, number, skip_bad)
            continue
        empty = False
        if isinstance(value, dict) and not _lists_of_rows(value):
            yield number, value
        else:
            yield from _rows_of(value, number, path, skip_bad)
    if empty:
        raise RecordError("is empty: it must hold rows", path=path)


class _SeveralLines(Exception):
    """A line is no value of its own: it goes on, or holds several."""


def _decode_line(raw: bytes) -> Any:
    try:
        return decode_json(raw, LENIENT_JSON)
    except RecordError as error:
        cause = error.__context__
        goes_on = isinstance(cause, json.JSONDecodeError) and (
            cause.msg.startswith("Extra data") or cause.pos >= len(cause.doc.rstrip())
        )
        if goes_on:
            raise _SeveralLines from error
        raise


def _rows_of(value: Any, number: int, path: str, skip_bad: SkipBad) -> NumberedRows:
    """A value's rows: itself; or those of the list in it where it is what a server answers to a request."""
    if not isinstance(value, dict):
        problem = f"is {describe(value)}: each row must be a JSON object"
        handle_bad_row(RecordError(problem), path, number, skip_bad)
        return
    lists = _lists_of_rows(value)
    if len(lists) == 1 and not _matches_any(value) and _matches_any(lists[0][0]):
        for row in lists[0]:
            if isinstance(row, dict):
                yield number, row
            else:
                problem = f"has a list in which {describe(row)} stands among the rows"
                handle_bad_row(RecordError(problem), path, number, skip_bad)
        return
    yield number, value


def _lists_of_rows(value: Row) -> list[list[Any]]:
    return [items for items in value.values() if isinstance(items, list) and _is_list_of_rows(items)]


def _is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of objects, other than the messages of a conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not is_message(value[0])


def _matches_any(row: Any) -> bool:
    return isinstance(row, dict) and any(row_format.matches(row) for row_format in FORMATS)


class _Values:
    """The JSON values of a text, one after another.

    Args:
        text: begins at the start of a line.
        first_line: the number of that line.
        path: for errors.
        skip_bad: as in `read_json`.
    """

    def __init__(self, text: str, first_line: int, path: str, skip_bad: SkipBad) -> None:
        self._text, self._path, self._skip_bad = text, path, skip_bad
        self._line, self._counted = first_line, 0
        self._damaged = 0

    def read(self) -> NumberedRows:
        """The rows, with the lines on which they begin."""
        position, first = self._skip_space(0), True
        while position < len(self._text):
            if self._text[position] == "[":
                position = yield from self._read_list(position)
            else:
                start, decoded, position = position, *self._decode(position)
                if decoded and first and self._skip_space(position) == len(self._text):
                    yield from self._unwrap(*decoded, start)
                elif decoded:
                    yield from _rows_of(decoded[0], self._line_of(start), self._path, self._skip_bad)
            first = False
            position = self._skip_space(position)
            if self._damaged > MAX_DAMAGED:
                yield from self._read_lines(position)
                return

    def _unwrap(self, value: Any, start: int) -> NumberedRows:
        """The rows of a file's only value: an object that is a row, or has one list of rows."""
        if not isinstance(value, dict) or _matches_any(value) or not value.keys().isdisjoint(PROMPT_KEYS):
            yield from _rows_of(value, self._line_of(start), self._path, self._skip_bad)
            return
        starts = self._find_lists(value, start)
        if not starts:
            yield self._line_of(start), value
            return
        if len(starts) > 1:
            problem = f"holds {len(starts)} lists of objects (its keys: {list_keys(value)}); one is wanted"
            raise RecordError(problem, path=self._path)
        yield from self._read_list(starts[0])

    def _find_lists(self, value: Row, start: int) -> list[int]:
        """Where those values of an object start that are lists of objects."""
        starts = []
        position = self._skip_space(start + 1)
        for inner in value.values():
            position = self._end_of_value(position)  # the key
            position = self._skip_space(self._skip_space(position) + 1)  # the colon
            if _is_list_of_rows(inner):
                starts.append(position)
            position = self._skip_space(self._skip_space(self._end_of_value(position)) + 1)  # the comma
        return starts

    def _end_of_value(self, position: int) -> int:
        return int(LENIENT_JSON.raw_decode(self._text, position)[1])

    def _read_list(self, start: int) -> Generator[tuple[int, Row], None, int]:
        """The objects of the list that starts at a position, decoded one by one; returns where it ends."""
        position = self._skip_space(start + 1)
        if self._text[position : position + 1] == "]":
            if self._skip_space(0) == start and self._skip_space(position + 1) == len(self._text):
                raise RecordError("is an empty list: it must hold rows", path=self._path)
            return position + 1
        while True:
            begin, decoded, position = position, *self._decode(position)
            if not decoded:
                return position
            if isinstance(decoded[0], dict):
                yield self._line_of(begin), decoded[0]
            else:
                problem = f"is {describe(decoded[0])}: each row must be an object"
                handle_bad_row(RecordError(problem), self._path, self._line_of(begin), self._skip_bad)
            position = self._skip_space(position)
            mark = self._text[position : position + 1]
            if mark == "]":
                return position + 1
            if mark != ",":
                return self._pass_over(position, "is not valid JSON (the list breaks off here)")
            position = self._skip_space(position + 1)

    def _decode(self, position: int) -> tuple[tuple[Any] | None, int]:
        """The value at a position, and where it ends; None, and where to go on, if it is bad and may be skipped."""
        try:
            value, end = LENIENT_JSON.raw_decode(self._text, position)
        except json.JSONDecodeError as error:
            return None, self._pass_over(position, f"is not valid JSON ({error.msg})", error.pos)
        except RecursionError:
            return None, self._pass_over(position, "is nested too deeply to be a record")
        except ValueError as error:
            return None, self._pass_over(position, f"is not valid JSON: {error}")
        return (value,), end

    def _pass_over(self, position: int, problem: str, place: int | None = None) -> int:
        """Tell what is bad; the start of the next line, where reading goes on."""
        self._damaged += 1
        line = self._line_of(position)
        if place is not None and not self._skip_bad:
            line += self._text.count("\n", position, min(place, len(self._text.rstrip())))
        handle_bad_row(RecordError(problem), self._path, line, self._skip_bad)
        end = self._text.find("\n", position)
        return len(self._text) if end < 0 else end + 1

    def _read_lines(self, position: int) -> NumberedRows:
        """What is left, as one value a line."""
        line = self._line_of(position)
        for text in io.StringIO(self._text[position:], newline="\n"):
            if text.strip():
                try:
                    value = decode_json(text, LENIENT_JSON)
                except RecordError as error:
                    handle_bad_row(error, self._path, line, self._skip_bad)
                else:
                    yield from _rows_of(value, line, self._path, self._skip_bad)
            line += 1

    def _line_of(self, position: int) -> int:
        """The line of a position; those asked for never go back."""
        self._line += self._text.count("\n", self._counted, position)
        self._counted = max(self._counted, position)
        return self._line

    def _skip_space(self, position: int) -> int:
        match = _SPACE.match(self._text, position)
        return match.end() if match else position
