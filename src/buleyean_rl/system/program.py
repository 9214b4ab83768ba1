"""The program's own command lines, spelled so that they run where they are typed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "buleyean"


def command_line(*words: object) -> str:
    """A command of this program, to be typed in the same folder and shell.

    Args:
        words: the command and its arguments.
    """
    return f"{_program()} {shlex.join(map(str, words))}"


def _program() -> str:
    """`buleyean`, if the shell finds the one of this environment; otherwise its path, or the module."""
    script = Path(sys.executable).parent / NAME
    found = shutil.which(NAME)
    if found is not None and os.path.realpath(found) == os.path.realpath(script):
        return NAME
    if os.access(script, os.X_OK) and script.is_file():
        return shlex.quote(_from_here(script))
    return f"{shlex.quote(_from_here(Path(sys.executable)))} -m buleyean_rl"


def _from_here(path: Path) -> str:
    """A path from the current folder, where that is shorter; links stay, as an environment's `python` is one."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") and os.sep in relative else str(path)
