"""What becomes of freed memory, where the C library is glibc; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# from glibc's malloc.h, with what it sets them to itself once large blocks have been freed
TRIM_THRESHOLD, OWN_TRIM_THRESHOLD = -1, 64 << 20
MMAP_MAX, OWN_MMAP_MAX = -4, 65536


def return_free_memory() -> None:
    """Give the system back what was allocated and freed since."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def freed_memory_retained() -> Iterator[None]:
    """Keep what is freed for what is allocated next, until `return_free_memory`.

    By default a large tensor's pages go back to the system and are taken anew, zeroed, for the next one.
    """
    option = _of_c_library("mallopt")
    if option is None:
        yield
        return
    option(MMAP_MAX, 0)
    option(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        option(MMAP_MAX, OWN_MMAP_MAX)
        option(TRIM_THRESHOLD, OWN_TRIM_THRESHOLD)


def _of_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
