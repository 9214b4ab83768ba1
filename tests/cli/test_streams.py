"""Standard streams that are closed, full or have no reader: no traceback, nothing written elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import make_record, read_records, write_records


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash; `$BULEYEAN` is the command."""
    return subprocess.run(
        ["bash", "-c", f"BULEYEAN='{sys.executable} -m buleyean_rl'; {line}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path / "records.jsonl", [make_record("Hi", ["Hello", "Bye"], [3, 1], 3)])
    return tmp_path


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_change_nothing(closed: str, folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}\n')
    done = shell(f"$BULEYEAN data import pairs.jsonl -o out.jsonl --json {closed}", folder)
    assert done.returncode == 0
    (record,) = read_records(folder / "out.jsonl")
    assert record.rejected_responses == ("Bye",)
    assert len(done.stdout.splitlines()) == (">&-" not in closed.replace("2>&-", ""))  # what is for stderr is not here


def test_an_error_without_a_stderr_is_not_on_stdout(folder: Path) -> None:
    done = shell("$BULEYEAN data validate missing.jsonl --json 2>&-", folder)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_closed_stream_is_not_taken_by_a_file(folder: Path) -> None:
    code = "import os; from buleyean_rl.cli import main; main(['--version']); os._exit(min(os.open('x', 65), 99))"
    assert shell(f'{sys.executable} -c "{code}" >&- 2>&- <&-', folder).returncode > 2


def test_text_that_a_stream_cannot_encode_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert main(["--version"]) == 0
    print(os.fsdecode(b"caf\xc3\xa9 \xff"), flush=True)
    assert out.getvalue().splitlines()[1] == b"caf\\xe9 \\udcff"
    assert sys.stdin.readline() == "caf\N{REPLACEMENT CHARACTER}\n"


def test_without_a_reader_nothing_is_said(folder: Path) -> None:
    done = shell("$BULEYEAN data validate records.jsonl --json | true; exit ${PIPESTATUS[0]}", folder)
    assert done.returncode in (0, 1)  # `true` may read nothing, and end before or after
    assert "Exception" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_full_stdout_is_one_line(folder: Path) -> None:
    done = shell("$BULEYEAN data validate records.jsonl --json > /dev/full", folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1:] == ["error: No space left on device"]
    assert "Traceback" not in done.stderr
