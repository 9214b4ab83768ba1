"""Files and folders are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buleyean_rl.system.files import (
    ABANDONED_SECONDS,
    atomic_folder,
    atomic_path,
    atomic_write,
    is_temporary,
    sweep_temporary,
    temporary_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "records.jsonl"
    with atomic_write(target) as file:
        file.write(b"half")
        assert not target.exists()
    assert (target.read_bytes(), names(tmp_path)) == (b"half", ["records.jsonl"])


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    write_json(target, {"step": 1})
    with pytest.raises(TypeError), atomic_write(target) as file:
        file.writelines([b"half", None])
    assert (json.loads(target.read_text()), names(tmp_path)) == ({"step": 1}, ["run.json"])


def test_a_path_that_is_no_utf8_comes_back_from_json(tmp_path: Path) -> None:
    path = os.fsdecode(b"/models/caf\xe9")
    write_json(tmp_path / "run.json", {"model": path, "other": "é"})
    assert json.loads((tmp_path / "run.json").read_bytes()) == {"model": path, "other": "é"}
    write_text(tmp_path / "README.md", path)
    assert (tmp_path / "README.md").read_bytes() == b"/models/caf?"


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_path(target) as first, atomic_path(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the outer one ends last


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_text(tmp_path / "pipe", "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_long_name_is_no_obstacle(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 250), "text")
    assert names(tmp_path) == ["x" * 250]


def test_the_first_of_two_folders_stays(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    with atomic_folder(target) as slow:
        (slow / "weights").write_text("slow")
        with atomic_folder(target) as fast:
            (fast / "weights").write_text("fast")
    assert (target / "weights").read_text() == "fast"
    assert names(target.parent) == ["model"]


def test_a_folder_that_failed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model"):
        raise RuntimeError
    assert names(tmp_path) == []


def leave_unfinished(target: Path) -> Path:
    """Write to `target` in a process that is killed meanwhile; returns what it left."""
    code = (
        "import os, signal, sys; from pathlib import Path; from buleyean_rl.system.files import *\n"
        "with atomic_write(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (leftover,) = target.parent.glob(f".{target.name}.*.tmp")
    return leftover


def test_what_a_killed_process_left_is_swept_at_once(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "killed")
    leave_unfinished(tmp_path / "other")
    (tmp_path / ".notes.tmp").touch()
    with atomic_write(tmp_path / "running") as file:
        file.write(b"half")
        sweep_temporary(tmp_path, "killed")
        assert not list(tmp_path.glob(".killed*"))
        assert list(tmp_path.glob(".other*"))
        sweep_temporary(tmp_path)
        assert not list(tmp_path.glob(".other*"))
    assert names(tmp_path) == [".notes.tmp", "running"]


def test_what_another_machine_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    left = leave_unfinished(tmp_path / "file").name
    machine, _, process = left.removeprefix(".file.").partition("-")
    other = f"{int(machine, 16) ^ 1:06x}-{process}"
    old, new, earlier = (tmp_path / f".{name}" for name in (f"a.{other}", f"b.{other}", "c.1-12345678.tmp"))
    for path in (old, new, earlier):
        path.touch()
    then = time.time() - ABANDONED_SECONDS - 1
    for path in (old, earlier, tmp_path / left):
        os.utime(path, (then, then))
    sweep_temporary(tmp_path)
    assert names(tmp_path) == [new.name, "new"]


def test_a_temporary_folder_goes_and_is_told_from_others(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "model.gguf") as folder:
        (folder / "model").touch()
        assert is_temporary(folder)
    assert names(tmp_path) == []
    assert not is_temporary(tmp_path / ".notes.tmp")
