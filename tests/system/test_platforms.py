"""macOS and Windows as far as Linux can play them: without what they lack, all is imported, and a model trains.

What a test cannot play here, such as a file that is open and cannot be deleted, it does not test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAY = """
import contextlib, io, os, pathlib, pkgutil, sys, tempfile

import datasets, matplotlib.pyplot, peft, psutil, torch, transformers  # which know their platforms
from transformers import Trainer  # noqa: F401

platform, modules, functions = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in modules:
            raise ImportError(f"{name} is not there")


class WithoutMkldnn:
    def __getattr__(self, name):
        raise AttributeError(name)


for name in modules:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
for name in functions:
    if hasattr(os, name):
        delattr(os, name)
torch.ops.mkldnn = WithoutMkldnn()
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
if platform == "win32":
    psutil.Process.memory_info = lambda self: type("Memory", (), {"rss": 1 << 30, "peak_wset": 1 << 30})
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: not str(self).startswith("/proc/") and exists(self, **options)

import buleyean_rl

for module in pkgutil.walk_packages(buleyean_rl.__path__, "buleyean_rl."):
    if not module.name.endswith(("__main__", "kernels.triton")):  # commands; CUDA's
        __import__(module.name)
sys.platform = platform  # what only torch's and Python's own modules ask

from buleyean_rl.cli import main
from buleyean_rl.kernels import build

print(build.status().problem)
for command in sys.argv[4:]:
    code = main(command.split("|"))
    assert code == 0, (command, code)
"""
# of the modules and functions of Python's library that this package calls
ABSENT = {
    "darwin": ("", "sched_getaffinity sched_setaffinity posix_fallocate"),
    "win32": (
        "fcntl resource pwd grp termios",
        "sched_getaffinity sched_setaffinity posix_fallocate getuid geteuid fork killpg uname sysconf",
    ),
}


@pytest.mark.parametrize("platform", ABSENT)
def test_a_model_trains_where_linux_is_not(platform: str, base: Path, rejections: Path, tmp_path: Path) -> None:
    modules, functions = ABSENT[platform]
    train = f"train|{rejections}|--model|{base}|--output|{tmp_path / 'run'}|--max-steps|1|--no-guard"
    command = [sys.executable, "-c", PLAY, platform, modules, functions, "doctor", train]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    played = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stderr
    assert f"there are none for {platform}" in played.stdout.splitlines()[0]
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["peak_rss_bytes"] > 0
