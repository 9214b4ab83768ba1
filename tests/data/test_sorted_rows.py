"""Rows on disk: read in order, equal ones as they came, whether they fitted in memory or not."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from buleyean_rl.data.records import sorted_rows
from buleyean_rl.data.records.sorted_rows import SortedRows

LOW, HIGH = -(1 << 63), (1 << 63) - 1


@pytest.mark.parametrize("run_rows", [7, 1 << 18])
def test_rows_come_in_order_and_equal_ones_together(monkeypatch: pytest.MonkeyPatch, run_rows: int) -> None:
    monkeypatch.setattr(sorted_rows, "RUN_ROWS", run_rows)
    random = np.random.default_rng(0)
    keys = [*random.choice([LOW, -1, 0, 5, HIGH], 100).tolist(), *random.integers(LOW, HIGH, 100).tolist()]
    with closing(SortedRows(2, LOW, HIGH)) as rows:
        for number, key in enumerate(keys[:150]):
            rows.add(key, number)
        rows.add_all(np.array([[key, number] for number, key in enumerate(keys[150:], 150)]))
        pieces = list(rows.read())
    expected = sorted(((key, number) for number, key in enumerate(keys)), key=lambda row: row[0])
    assert np.concatenate(pieces).tolist() == [list(row) for row in expected]
    ends = [(piece[0, 0], piece[-1, 0]) for piece in pieces]
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert (len(pieces) > 1) == (run_rows == 7)


def test_no_rows_are_no_pieces() -> None:
    with closing(SortedRows(1, 0, 9)) as rows:
        assert list(rows.read()) == []
