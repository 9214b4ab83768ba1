"""Building the kernels: once, where it is safe, and a reason where there are none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from buleyean_rl.kernels import abi, build
from marks import needs_c


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing was built; how many times the compiler ran is in `commands`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A library that is built fast; the commands that were run."""
    sources, commands, run = tmp_path / "c", [], build._run
    sources.mkdir()
    (sources / "tiny.c").write_text('const char *instruction_set(void) { return "tiny"; }\n', encoding="utf-8")
    monkeypatch.setattr(build, "FOLDER", sources)
    monkeypatch.setattr(build, "_run", lambda command: (commands.append(command), run(command)))
    return commands


def forget() -> None:
    build.load.cache_clear()
    abi.library.cache_clear()


@needs_c
@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("CC", "no-such-compiler", "no C compiler no-such-compiler"),
        ("CC", "false", "false fails"),
        ("BULEYEAN_KERNELS", "0", "turned off by BULEYEAN_KERNELS=0"),
        ("BULEYEAN_KERNEL_FLAGS", "-include no-such-file.h", "no-such-file.h"),
    ],
)
def test_where_there_are_no_kernels_the_status_says_why(
    variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    monkeypatch.setenv(variable, value)
    status = build.status()
    assert status.instruction_set is None
    assert status.problem is not None
    assert problem in status.problem
    assert "\n" not in status.problem
    assert not abi.available(torch.zeros(0, dtype=torch.bfloat16))
    assert not list(fresh_cache.rglob("*.so"))


@needs_c
@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (lambda m: m.setattr(sys, "platform", "darwin"), "only for Linux on x86-64"),
        (lambda m: m.setattr("platform.machine", lambda: "aarch64"), "only for Linux on x86-64"),
        (lambda m: m.setattr(build, "_processor", lambda: ("Pentium", "mmx sse2")), "no AVX2"),
        (lambda m: m.setattr(torch, "__file__", "/nowhere/torch/__init__.py"), "install torch by pip"),
        (lambda m: (m.delenv("CC", False), m.setattr("shutil.which", lambda _: None)), "install gcc"),
    ],
)
def test_where_they_cannot_be_it_says_what_is_missing(
    patch: Callable[[pytest.MonkeyPatch], Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch)
    assert problem in (build.status().problem or "")


@needs_c
def test_it_is_built_once(tiny: list[list[str]], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = build.status()
    assert (status.instruction_set, status.problem) == ("tiny", None)
    assert status.library is not None
    assert status.library.parent.stat().st_mode & 0o777 == 0o700
    assert len(tiny) == 2  # compiled, linked
    forget()
    assert build.status() == status
    assert len(tiny) == 2
    monkeypatch.setenv("BULEYEAN_KERNEL_FLAGS", "-DOTHER")
    forget()
    assert build.status().library != status.library
    assert len(list(fresh_cache.rglob("*.so"))) == 2
    assert not list(fresh_cache.rglob("*.o"))


@needs_c
def test_a_compiler_may_have_a_launcher(tiny: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = os.environ.get("CC", "gcc")
    monkeypatch.setenv("CC", f"env {compiler}")
    assert build.status().problem is None
    assert tiny[0][:2] == ["env", compiler]


@needs_c
def test_a_folder_that_others_may_write_to_is_refused(tiny: list[list[str]], fresh_cache: Path) -> None:
    folder = fresh_cache / "buleyean-rl" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others may write" in (build.status().problem or "")
    assert not tiny


@needs_c
def test_a_struct_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (("more", ctypes.c_int64 * 9),)

    monkeypatch.setenv("BULEYEAN_KERNEL_FLAGS", "-O0")
    monkeypatch.setattr(abi, "STRUCTS", (Longer, *abi.STRUCTS[1:]))
    with pytest.raises(ImportError, match=r"kernels\.h and abi\.py differ"):
        abi.library()


@needs_c
@pytest.mark.slow
def test_two_processes_may_build_at_once(fresh_cache: Path) -> None:
    code = "from buleyean_rl.kernels.build import status; assert status().problem is None, status()"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(fresh_cache.rglob("*.so"))) == 1
