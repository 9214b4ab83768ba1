"""Preferences: every shape that is imported, read with its chosen answers; turned around, they turn around."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.importers import Preference, read_preferences
from buleyean_rl.errors import RecordError, UsageError


def file(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, (("a", "b"), (0, 1), 1)),
        ({"rejected": "b", "question": "p", "chosen": "a", "id": 3}, (("a", "b"), (0, 1), 1)),
        ({"prompt": "p", "chosen": [said("a")], "rejected": [said("b")]}, (("a", "b"), (0, 1), 1)),
        ({"chosen": [user("p"), said("a")], "rejected": [user("p"), said("b")]}, (("a", "b"), (0, 1), 1)),
        (
            {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
            (("a", "b"), (0, 1), 1),
        ),
        ({"prompt": "p", "chosen": True, "rejected": 42}, (("true", "42"), (0, 1), 1)),
        ({"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}, (("a", "b", "c"), (0, 1, 1), 1)),
        (
            {
                "prompt": "p",
                "candidates": [{"response": "a", "rejection_count": 3}, {"response": "b", "rejection_count": 0}],
                "total_rounds": 3,
            },
            (("a", "b"), (3, 0), 3),
        ),
        (
            {
                "prompt": "p",
                "completions": [{"response": t, "score": s} for t, s in zip("abc", (1, 5, 5), strict=True)],
            },
            (("a", "b", "c"), (2, 0, 0), 2),
        ),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [0.1, 0.9]}, (("a", "b"), (1, 0), 1)),
        ({"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [4, 1]}, (("a", "b"), (4, 1), 4)),
    ],
)
def test_a_row_of_every_shape(tmp_path: Path, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    (read,) = read_preferences(file(tmp_path, row)).items
    assert read == Preference("p", *expected)


def test_labels_of_a_prompt_come_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("p"), said("a")], "label": True},
        {"messages": [user("q"), said("z")], "label": False},
        {"prompt": "p", "completion": "b", "label": False},
        {"prompt": "p", "completion": "a", "label": False},
    ]
    read = read_preferences(file(tmp_path, *rows)).items
    assert read == (Preference("p", ("a", "b"), (1, 2), 2), Preference("q", ("z",), (1,), 1))
    assert read[0].pairs() == [(0, 1)]
    assert read[1].pairs() == []


def test_pairs_are_all_that_the_counts_decide() -> None:
    assert Preference("p", ("a", "b", "c"), (2, 0, 0), 2).pairs() == [(1, 0), (2, 0)]
    assert Preference("p", ("a", "b"), (1, 1), 3).pairs() == []


def test_turned_around(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    there, back = read_preferences(file(tmp_path, *rows)), read_preferences(file(tmp_path, *turned, name="b.jsonl"))
    for one, other in zip(there.items, back.items, strict=True):
        assert one.answers == other.answers[::-1]
        assert one.rejections == other.rejections


def test_blank_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": " \n"}, {"prompt": "q", "chosen": "", "rejected": ""}]
    read = read_preferences(file(tmp_path, *rows))
    assert read.items == (Preference("p", ("a",), (0,), 1),)
    assert read.empty == 3


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"prompt": "p", "chosen": "a"}, "data.jsonl:2: has no rejected answer"),
        ({"prompt": "p", "chosen": {"a": 1}, "rejected": "b"}, "data.jsonl:2: chosen is an object"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "data.jsonl:2: the prompt is empty"),
    ],
)
def test_a_bad_row_says_where_it_is(tmp_path: Path, bad: dict[str, Any], problem: str) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = file(tmp_path, good, bad, good)
    with pytest.raises(RecordError, match=problem):
        read_preferences(path)
    read = read_preferences(path, skip_bad=True)
    assert (len(read.items), read.skipped) == (2, 1)


def test_bad_counts_and_formats(tmp_path: Path) -> None:
    candidates = [{"response": "a", "rejection_count": 4}, {"response": "b", "rejection_count": 0}]
    path = file(tmp_path, {"prompt": "p", "candidates": candidates, "total_rounds": 3})
    with pytest.raises(RecordError, match=r"data.jsonl:1: total_rounds is the number 3: .* 4 or more"):
        read_preferences(path)
    with pytest.raises(UsageError, match="no format"):
        read_preferences(path, "nonsense")
    with pytest.raises(RecordError, match="no known format"):
        read_preferences(file(tmp_path, {"text": "x"}))


def test_a_limit_is_the_first_so_many(tmp_path: Path) -> None:
    path = file(tmp_path, *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)))
    assert [item.prompt for item in read_preferences(path, limit=2).items] == ["p0", "p1"]
