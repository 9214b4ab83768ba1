"""The folder of things kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.system.cache import evict_lru, memoize_to_disk


def entry(folder: Path, name: str, used: int, kilobytes: int) -> None:
    (folder / name).mkdir()
    (folder / name / "data").write_bytes(b"x" * (kilobytes << 10))
    os.utime(folder / name, (used, used))


def test_the_same_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"nats": 0.1 + 0.2, "of": [len(made), None]}

    first = memoize_to_disk("nats", ["model", 8, ["a prompt"]], make)
    assert memoize_to_disk("nats", ["model", 8, ["a prompt"]], make) == first == {"nats": 0.1 + 0.2, "of": [1, None]}
    assert memoize_to_disk("nats", ["model", 8, ["another"]], make)["of"] == [2, None]
    assert memoize_to_disk("others", ["model", 8, ["a prompt"]], make)["of"] == [3, None]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for used, name in enumerate(("old", "older", "new")):
        entry(tmp_path, name, 3 - used if name != "new" else 9, 64)
    evict_lru(tmp_path, 150 << 10)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    evict_lru(tmp_path, 150 << 10)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    evict_lru(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_files_are_entries_too(tmp_path: Path) -> None:
    for used, name in enumerate("ab"):
        (tmp_path / name).write_bytes(b"x" * 8192)
        os.utime(tmp_path / name, (used, used))
    evict_lru(tmp_path, 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_there_may_be_nothing(tmp_path: Path) -> None:
    evict_lru(tmp_path / "nothing", 1)
