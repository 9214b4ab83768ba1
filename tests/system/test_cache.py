"""The folder of things kept between runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import main
from buleyean_rl.errors import UsageError
from buleyean_rl.system.cache import cache_folder, evict_lru, make_cache_folder, memoize_to_disk
from hostile.disk import files_at_most


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


def test_a_damaged_result_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memoize_to_disk("nats", [], lambda: {"nats": 1})
    (file,) = tmp_path.rglob("nats-*.json")
    file.write_text('{"nats"')
    assert memoize_to_disk("nats", [], lambda: {"nats": 2}) == {"nats": 2}


def test_a_full_disk_costs_the_cache_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with files_at_most(10):
        assert memoize_to_disk("answers", [], lambda: {"answers": ["a" * 100]}) == {"answers": ["a" * 100]}
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'buleyean-rl'}: File too large")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_killed_commands_left_is_swept_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import os, signal; from buleyean_rl.system.cache import cache_folder; from buleyean_rl.system.files import *\n"
        "with atomic_folder(cache_folder() / 'models' / 'x') as folder, atomic_write(cache_folder() / 'y'):\n"
        "    (folder / 'weights').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.rglob("*.tmp"))) == 2
    assert main(["data", "validate", str(tmp_path / "none.jsonl")]) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_a_home_to_write_to_the_cache_is_among_temporary_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/dev/null/home")  # not even root can make it
    folder = tmp_path / f"buleyean-rl-{os.getuid()}"
    assert make_cache_folder("tokens") == folder / "tokens"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (
        f"no home folder that can be written: the cache is {folder}; XDG_CACHE_HOME moves it\n"
    )
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() == folder
    assert capsys.readouterr().err == ""  # said once
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="is not yours alone: set HOME or XDG_CACHE_HOME"):
        cache_folder()
    assert main(["data", "validate", str(tmp_path / "none.jsonl")]) == 1  # it needs none


def test_a_home_that_is_read_only_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == home / ".cache/buleyean-rl"
    monkeypatch.setattr(os, "access", lambda path, _: home not in (path, *path.parents))  # root may write it
    assert cache_folder().parent == tmp_path


def test_a_relative_cache_is_the_home_folder_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder() == tmp_path / ".cache" / "buleyean-rl"


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, problem in (
        (str(tmp_path / "file"), "Not a directory: set XDG_CACHE_HOME"),
        (os.fsdecode(b"/caf\xe9"), "is not UTF-8"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        with pytest.raises(UsageError, match=problem):
            make_cache_folder("tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_cache_folder("tokens") == tmp_path / "buleyean-rl" / "tokens"
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="is read-only to you: set XDG_CACHE_HOME"):
        make_cache_folder("tokens")


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
