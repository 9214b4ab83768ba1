"""Run the command on hostile input, and say what it must never do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from buleyean_rl.cli import main

HANG_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: its exit code; negative for a signal.
        out: what it printed on stdout.
        err: on stderr, with the traceback if it had one.
    """

    code: int
    out: str
    err: str


def run_command(*arguments: str | Path) -> Outcome:
    """`buleyean ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:  # what a person would see as a traceback
            traceback.print_exc(file=err)
            code = 1
    return Outcome(code, out.getvalue(), err.getvalue())


def run_process(*arguments: str | Path, environment: dict[str, str] | None = None) -> Outcome:
    """`buleyean ARGUMENTS` in a process of its own, which must end within a minute."""
    command = [sys.executable, "-m", "buleyean_rl", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_SECONDS, env=os.environ | (environment or {}), check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_clear(outcome: Outcome, codes: Sequence[int] = (0, 1, 2)) -> None:
    """The command ended by itself, with one of these codes, and failed only with a message."""
    assert outcome.code in codes, outcome
    assert "Traceback (most recent call last)" not in outcome.err, outcome.err
    assert outcome.code == 0 or outcome.err.strip(), outcome


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Nothing in these folders is changed, deleted or added in the context."""
    before = {folder: _contents(folder) for folder in folders}
    yield
    for folder in folders:
        assert _contents(folder) == before[folder], folder


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
