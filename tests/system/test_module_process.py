"""A module as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from buleyean_rl.system.module_process import module_command, module_environment

MODULE = """
import os, queue, sys
from buleyean_rl.system.module_process import take_stdout
replies = take_stdout()
print("a library's word", flush=True)
os.write(1, b"and C's")
print(queue.Queue.__name__, *sys.argv[1:], os.environ["OWN"], file=replies, flush=True)
"""


def test_it_finds_the_modules_of_its_starter_and_none_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, current = tmp_path / "modules", tmp_path / "current"
    modules.mkdir()
    current.mkdir()
    (modules / "replying.py").write_text(MODULE)
    (current / "queue.py").write_text("raise SystemExit('somebody's own')")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(current)
    done = subprocess.run(
        module_command("replying", "one", "two"), env=module_environment(OWN="mine"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Queue one two mine\n"
    assert "a library's word" in done.stderr
    assert "and C's" in done.stderr
