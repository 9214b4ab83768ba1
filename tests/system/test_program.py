"""Commands that are told to people run where they are typed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from buleyean_rl.system.program import command_line


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an environment in it, the current one; the shell finds nothing."""
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    return folder


def make_program(folder: Path) -> None:
    (folder / "buleyean").touch(0o755)


def test_the_module_where_there_is_no_script(environment: Path) -> None:
    assert command_line("chat", "my run") == ".venv/bin/python -m buleyean_rl chat 'my run'"
    elsewhere = environment.parent / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert command_line("chat") == f"{environment}/python -m buleyean_rl chat"


def test_the_script_where_the_shell_does_not_find_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(environment)
    assert command_line("runs", Path("a")) == ".venv/bin/buleyean runs a"
    other = environment.parent / "other"
    other.mkdir()
    make_program(other)
    monkeypatch.setenv("PATH", str(other))  # another environment's
    assert command_line("runs") == ".venv/bin/buleyean runs"
    monkeypatch.setenv("PATH", str(environment))
    assert command_line("runs") == "buleyean runs"
