"""A module of this program as a process of its own: how it is started, and how it keeps its replies apart."""

from __future__ import annotations

import os
import sys
from typing import IO, Any


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module. `module_environment` goes with it.

    Python would look for modules in the current folder first: a user's `queue.py` would run there.

    Args:
        module: its full name.
        arguments: of it.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which a process finds the same modules.

    Args:
        variables: others, or of other values.
    """
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))} | variables


def take_stdout(mode: str = "w") -> IO[Any]:
    """Stdout, for replies alone: what a library prints goes to stderr from now on.

    Args:
        mode: `w` or `wb`.
    """
    replies = os.fdopen(os.dup(1), mode)
    os.dup2(2, 1)
    return replies
