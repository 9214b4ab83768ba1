"""Keys: in the environment, or in a file that nobody else can read; never in a command line, a log or an error."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint_client import read_key

SERVE_VARIABLE = "BULEYEAN_SERVE_KEY"
MAX_KEY_BYTES = 4096


def find_key(variable: str, path: Path | None = None) -> str:
    """A key; "" where there is none.

    Args:
        variable: of the environment, that may hold it.
        path: of a file that holds it; None for none.

    Raises:
        UsageError: the file is not there, or others can read it; or it holds no key.
    """
    return read_key(variable) if path is None else _read_file(path)


def _read_file(path: Path) -> str:
    # not the path itself, which may be a key that somebody gave in its place
    try:
        with path.open("rb") as file:
            status, content = os.fstat(file.fileno()), file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"the file of the key cannot be read ({error.strerror}): name a file, not the key") from None
    if hasattr(os, "getuid") and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path} can be read by others: chmod 600 {path}")
    try:
        key = content.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise UsageError(f"{path} holds no key: write the key into it, and nothing else")
    return key
