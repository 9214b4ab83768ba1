"""Rows of integers on disk, read again in order: however many there are, only a part of them is in memory.

rows --so many at a time, sorted--> runs in a temporary file --part of the range by part--> rows in order
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RUN_ROWS = 1 << 18
PARTS = 256  # of the range of the first column, read one at a time


class SortedRows:
    """Rows of 64-bit integers that come out in the order of their first column, and where it is equal as they came.

    Args:
        columns: of a row.
        low: the smallest value of the first column.
        high: the largest value; the values should spread over the range.
        folder: where the temporary file is; None for the system's.
    """

    def __init__(self, columns: int, low: int, high: int, folder: Path | None = None) -> None:
        self._columns, self._run_size, self._buffer = columns, RUN_ROWS * columns, array("q")
        self._bounds = np.array([low + (high - low) * part // PARTS for part in range(1, PARTS)], dtype=np.int64)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - until `close`
        self._runs: list[np.ndarray] = []  # of each, where its parts begin and end in the file, in rows

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def add(self, *row: int) -> None:
        """Add a row."""
        self._buffer.extend(row)
        if len(self._buffer) >= self._run_size:
            self._write_run()

    def add_all(self, rows: np.ndarray) -> None:
        """Add rows. Shape: (rows, columns)."""
        self._buffer.frombytes(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
        if len(self._buffer) >= self._run_size:
            self._write_run()

    def read(self) -> Iterator[np.ndarray]:
        """The rows, in order, in pieces; equal values of the first column are in one. Shape of each: (rows, columns).

        Nothing can be added afterwards.
        """
        if not self._runs:
            yield from [self._take_buffer()] if self._buffer else []
            return
        self._write_run()
        for part in range(PARTS):
            pieces = [self._read_rows(int(ends[part]), int(ends[part + 1])) for ends in self._runs]
            rows = np.concatenate(pieces)
            if len(rows):
                yield _in_order(rows)

    def _write_run(self) -> None:
        rows = self._take_buffer()
        start = int(self._runs[-1][-1]) if self._runs else 0
        ends = np.searchsorted(rows[:, 0].copy(), self._bounds, side="right")
        self._file.write(rows.tobytes())
        self._runs.append(start + np.concatenate([[0], ends, [len(rows)]]))

    def _take_buffer(self) -> np.ndarray:
        rows = _in_order(np.frombuffer(self._buffer.tobytes(), dtype=np.int64).reshape(-1, self._columns))
        del self._buffer[:]
        return rows

    def _read_rows(self, start: int, end: int) -> np.ndarray:
        size = self._columns * 8
        self._file.seek(start * size)
        return np.frombuffer(self._file.read((end - start) * size), dtype=np.int64).reshape(-1, self._columns)


def _in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0], kind="stable")]
