"""Print the command reference: every command's own help, as Markdown."""

from __future__ import annotations

import contextlib
import io
import os

os.environ |= {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}

from buleyean_rl.cli import main

COMMANDS = (
    "",
    "demo",
    "data import",
    "data validate",
    "train",
    "runs",
    "export",
    "chat",
    "evaluate",
    "push",
    "mine",
    "walk",
    "void",
    "serve",
    "swap",
    "connect",
    "doctor",
)


def reference() -> str:
    """The whole page."""
    parts = ["# Commands\n\nWritten by `make docs` from the commands' own help; a test fails where the two differ.\n"]
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            main([*command.split(), "--help"])
        body = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        parts.append(f"## buleyean {command}".rstrip() + f"\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
