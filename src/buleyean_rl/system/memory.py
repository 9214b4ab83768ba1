"""Freed memory goes back to the system, where the C library is glibc; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import os


def return_free_memory() -> None:
    """Give the system back what was allocated and freed since."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
