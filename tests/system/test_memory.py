"""Freed memory stays the process's while it is to be kept, and goes back otherwise."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, psutil
from buleyean_rl.system.memory import freed_memory_retained, return_free_memory

SIZE = 64 << 20

def held_after_use():
    used = bytearray(SIZE)  # every page of it is written
    del used
    return (psutil.Process().memory_info().rss - before) / SIZE

before = psutil.Process().memory_info().rss
held = {"by default": held_after_use()}
with freed_memory_retained():
    held["kept"] = held_after_use()
    held["kept, of the same"] = held_after_use()
    return_free_memory()
    held["given back"] = (psutil.Process().memory_info().rss - before) / SIZE
    held["kept anew"] = held_after_use()
return_free_memory()
held["after it"] = held_after_use()
print(json.dumps(held))
"""


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_kept_memory_is_used_again_and_goes_back_when_asked() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held = json.loads(result.stdout)
    for name in ("kept", "kept, of the same", "kept anew"):
        assert held[name] == pytest.approx(1, abs=0.1), name
    for name in ("by default", "given back", "after it"):
        assert held[name] == pytest.approx(0, abs=0.1), name
