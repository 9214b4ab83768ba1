"""Nothing that is not ours is replaced, and a folder is one process's."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from buleyean_rl.errors import UsageError
from buleyean_rl.system.outputs import LOCK, check_output_file, claim_folder, open_output


def write(path: Path, data: bytes = b"new") -> None:
    check_output_file(path)
    with open_output(path) as file:
        file.write(data)


@pytest.mark.parametrize("path", ["", "folder", "missing/file"])
def test_a_path_that_names_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"name the file to write|create the folder"):
        check_output_file(Path(path))


def test_a_folder_that_is_read_only_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="is read-only to you"):
        check_output_file(tmp_path / "file")


def test_a_file_of_somebody_else_stays_unless_it_may_go(tmp_path: Path) -> None:
    (file := tmp_path / "notes.txt").write_text("theirs")
    with pytest.raises(UsageError, match=r"is there already.*--overwrite"):
        check_output_file(file)
    with pytest.raises(UsageError):
        check_output_file(file, is_ours=lambda path: path.read_text() == "ours")
    check_output_file(file, is_ours=lambda path: path.read_text() == "theirs")
    check_output_file(file, overwrite=True)
    (empty := tmp_path / "empty").touch()
    write(empty)
    assert (file.read_text(), empty.read_text()) == ("theirs", "new")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    with pytest.raises(UsageError, match="link is there already"):
        check_output_file(tmp_path / "link")


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    (nowhere := tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(UsageError, match="leads back to itself"):
        check_output_file(loop, overwrite=True)
    for folder in (loop, nowhere):
        with pytest.raises(UsageError, match="is a link to nothing"), claim_folder(folder, has_mark, "run"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "nowhere"]


def test_a_folder_that_others_would_name_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, problem in (("~/run", "write the whole path"), (os.fsdecode(b"caf\xe9"), "is not UTF-8")):
        with pytest.raises(UsageError, match=problem), claim_folder(Path(name), has_mark, "run"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        check_output_file(pipe, streams=False)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(timeout=10)
    assert read == [b"new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    null, full = tmp_path / "null", tmp_path / "full"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        null.open("ab").close()
    except OSError as error:
        pytest.skip(f"no devices here: {error}")
    write(null)
    with pytest.raises(OSError, match="full") as caught:
        write(full)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full))
    assert stat.S_ISCHR(null.stat().st_mode)
    assert stat.S_ISCHR(full.stat().st_mode)


def test_standard_output_is_appended_to(tmp_path: Path) -> None:
    (log := tmp_path / "log").write_text("first\n")
    code = (
        "from pathlib import Path; from buleyean_rl.system.outputs import *\n"
        "check_output_file(Path('/dev/stdout'))\n"
        "with open_output(Path('/dev/stdout')) as file: file.write(b'second\\n')"
    )
    with log.open("a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert log.read_text() == "first\nsecond\n"


def has_mark(folder: Path) -> bool:
    return (folder / "mark").exists()


def test_a_folder_is_new_empty_or_ours(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with claim_folder(folder, has_mark, "run"):
        (folder / "mark").touch()
    assert [path.name for path in folder.iterdir()] == ["mark"]
    with claim_folder(folder, has_mark, "run"):
        pass
    (folder / ".tmpAb01xy").touch()  # safetensors writes to such files
    (folder / ".tmp").touch()
    with claim_folder(folder, has_mark, "run"):
        assert sorted(path.name for path in folder.iterdir()) == [LOCK, ".tmp", "mark"]
    (theirs := tmp_path / "theirs").mkdir()
    with claim_folder(theirs, has_mark, "run"):
        pass
    (theirs / "notes.txt").touch()
    with pytest.raises(UsageError, match="is not empty and has no run of ours"), claim_folder(theirs, has_mark, "run"):
        pass
    with pytest.raises(UsageError, match="is a file"), claim_folder(theirs / "notes.txt", has_mark, "run"):
        pass
    assert [path.name for path in theirs.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["", "1234\n", "held by a backup\n"])
def test_a_folder_with_only_a_lock_of_another_program_is_not_empty(tmp_path: Path, content: str) -> None:
    (lock := tmp_path / LOCK).write_text(content)
    with (
        pytest.raises(UsageError, match="is not empty and has no run of ours"),
        claim_folder(tmp_path, has_mark, "run"),
    ):
        pass
    assert lock.read_text() == content
    lock.write_text("buleyean-rl 1234\n")  # of a process that was killed
    with claim_folder(tmp_path, has_mark, "run"):
        pass
    assert not lock.exists()


def test_a_folder_that_stayed_empty_goes_again_if_it_is_new(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claim_folder(tmp_path / "run", has_mark, "run"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["mark", "half"])
def test_the_second_is_told_who_holds_a_folder(tmp_path: Path, content: str) -> None:
    with claim_folder(tmp_path, has_mark, "run"):
        (tmp_path / content).touch()
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), claim_folder(tmp_path, has_mark, "x"):
            pass
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
