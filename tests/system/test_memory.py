"""Freed memory goes back to the system when asked."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import psutil
from buleyean_rl.system.memory import return_free_memory

BLOCK, COUNT = 64 << 10, 2000  # blocks that malloc takes from its heap

blocks = [bytearray(BLOCK) for _ in range(COUNT)]
last = bytearray(BLOCK)  # keeps the heap's end where it is
blocks.clear()
before = psutil.Process().memory_info().rss
return_free_memory()
print((before - psutil.Process().memory_info().rss) / (BLOCK * COUNT))
"""


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_freed_memory_goes_back_when_asked() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 0.8
