"""Checks of a GGUF file that read no tensor: is it one, and why an engine may refuse it."""

from __future__ import annotations

import os
from pathlib import Path

from buleyean_rl.errors import EngineError

GGUF_MAGIC = b"GGUF"


def check_gguf(path: Path | str) -> None:
    """Check by its header that a file is GGUF.

    Raises:
        EngineError: it does not exist, is not a file, not GGUF, or of another version.
    """
    path = Path(path)
    if not path.exists():
        raise EngineError(f"{path}: no such file")
    if not path.is_file():
        raise EngineError(f"{path}: is not a file; name the .gguf inside it")
    try:
        with path.open("rb") as file:
            header = file.read(8)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    if header[:4] != GGUF_MAGIC:
        raise EngineError(f"{path}: is not a GGUF file; make one with `buleyean export`")
    if int.from_bytes(header[4:], "little") not in (2, 3):
        raise EngineError(f"{path}: GGUF version {int.from_bytes(header[4:], 'little')} is not 2 or 3")


def load_failure_reason(path: Path) -> str:
    """Why llama.cpp may have refused a file whose header is fine."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        # The reader slices the mapped file: a tensor beyond its end has the wrong shape.
        return "the file is cut short or damaged; copy or export it again"
    return "an architecture or tensor it does not support, or too little free memory"


def available_cores() -> int:
    """Number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
