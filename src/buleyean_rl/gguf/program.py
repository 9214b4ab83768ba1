"""Run another program, and turn its failure into one line."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from buleyean_rl.errors import ExportError


def run_program(command: Sequence[str], name: str, task: str = "") -> None:
    """Run a program to its end.

    Args:
        command: program and arguments.
        name: of the program, for the message.
        task: follows "failed" in the message, with a space before it.

    Raises:
        ExportError: it failed or was stopped by a signal; with the last line it printed.
    """
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.decode(errors="replace").splitlines() if line.strip()]
        outcome = f"was stopped by signal {-result.returncode}" if result.returncode < 0 else "failed"
        raise ExportError(f"{name} {outcome}{task}: {lines[-1] if lines else 'it printed nothing'}")
