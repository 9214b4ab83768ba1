"""Preferences: every shape that is imported, read with its chosen answers; turned around, they turn around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.importers import Preference, Preferences, read_preferences
from buleyean_rl.errors import RecordError, UsageError
from drawn import write_rows
from rows import assistant, user


def read(folder: Path, *rows: Any, **options: Any) -> Preferences:
    return read_preferences(str(write_rows(folder / "data.jsonl", *rows)), **options)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SCORED = [{"response": text, "score": score} for text, score in zip("abc", (1, 5, 5), strict=True)]
COUNTED = [{"response": "a", "rejection_count": 3}, {"response": "b", "rejection_count": 0}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, (("a", "b"), (0, 1), 1)),
        ({"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}, (("a", "b"), (0, 1), 1)),
        ({f: f"\n\nHuman: p\n\nAssistant: {f}" for f in ("chosen", "rejected")}, (("chosen", "rejected"), (0, 1), 1)),
        ({"prompt": "p", "chosen": True, "rejected": 42}, (("true", "42"), (0, 1), 1)),
        ({"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}, (("a", "b", "c"), (0, 1, 1), 1)),
        ({"prompt": "p", "candidates": COUNTED, "total_rounds": 3}, (("a", "b"), (3, 0), 3)),
        ({"prompt": "p", "completions": SCORED}, (("a", "b", "c"), (2, 0, 0), 2)),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [0.1, 0.9]}, (("a", "b"), (1, 0), 1)),
        ({"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [4, 1]}, (("a", "b"), (4, 1), 4)),
    ],
)
def test_a_row_of_every_shape(tmp_path: Path, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    (preference,) = read(tmp_path, row).items
    assert preference == Preference("p", *expected)


def test_labels_of_a_prompt_come_together(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        {"messages": [user("p"), assistant("a")], "label": True},
        {"messages": [user("q"), assistant("z")], "label": False},
        {"prompt": "p", "completion": "b", "label": False},
        {"prompt": "p", "completion": "a", "label": False},
    ).items
    assert first == Preference("p", ("a", "b"), (1, 2), 2)
    assert second == Preference("q", ("z",), (1,), 1)


def test_pairs_are_all_that_the_counts_decide() -> None:
    assert Preference("p", ("a", "b", "c"), (2, 0, 0), 2).pairs() == [(1, 0), (2, 0)]
    assert Preference("p", ("a", "b"), (1, 1), 3).pairs() == []


def test_turned_around(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    there = read(tmp_path, *rows)
    back = read(tmp_path, *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows))
    for one, other in zip(there.items, back.items, strict=True):
        assert one.answers == other.answers[::-1]
        assert one.rejections == other.rejections
    assert [item.prompt for item in read(tmp_path, *rows, limit=1).items] == ["p"]


def test_blank_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    preferences = read(tmp_path, PAIR | {"rejected": " \n"}, {"prompt": "q", "chosen": "", "rejected": ""})
    assert preferences.items == (Preference("p", ("a",), (0,), 1),)
    assert preferences.empty == 3


def test_a_bad_row_is_refused_with_its_place(tmp_path: Path) -> None:
    for change, problem in (
        ({"rejected": None}, "data.jsonl:2: has no rejected answer"),
        ({"chosen": {"a": 1}}, "data.jsonl:2: chosen is an object"),
        ({"prompt": " "}, "data.jsonl:2: the prompt is empty"),
    ):
        with pytest.raises(RecordError, match=problem):
            read(tmp_path, PAIR, PAIR | change, PAIR)
        preferences = read(tmp_path, PAIR, PAIR | change, PAIR, skip_bad=True)
        assert (len(preferences.items), preferences.skipped) == (2, 1)
    with pytest.raises(RecordError, match=r"data.jsonl:1: total_rounds is the number 2: it must be between 3 and"):
        read(tmp_path, {"prompt": "p", "candidates": COUNTED, "total_rounds": 2})
    with pytest.raises(UsageError, match="no format"):
        read(tmp_path, PAIR, format="nonsense")
    with pytest.raises(RecordError, match="no known format"):
        read(tmp_path, {"text": "x"})
