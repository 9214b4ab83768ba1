"""The C sources here as a library, built by the machine's own compiler on first use and kept in the user's cache.

    processor, compiler, flags, sources --hash--> <cache>/kernels/<hash>.so, from then on without a subprocess

`BULEYEAN_KERNELS=0` turns the kernels off, `CC` names the compiler, `BULEYEAN_KERNEL_FLAGS` are flags for it.
`python -m buleyean_rl.kernels.build --check` compiles for every instruction set, warnings as errors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import torch

from buleyean_rl.system.cache import cache_folder
from buleyean_rl.system.files import temporary_folder

FOLDER = Path(__file__).parent / "c"
FLAGS = (
    *("-std=c11", "-O3", "-fopenmp", "-fPIC", "-mprefer-vector-width=512"),  # compilers take 256
    *("-Wall", "-Wextra", "-Wno-pass-failed"),  # that clang does not vectorize a loop is no fault
    # of -ffast-math only what leaves NaN and infinity alone
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-fno-strict-aliasing"),
    "-ffp-contract=fast",  # which -std=c11 turns off
)
INSTRUCTION_SETS = {  # best first: the features it needs, as Linux names them, and the flag that hides it
    "AMX": ({"amx_tile", "amx_bf16", "avx512_bf16"}, "-mno-amx-bf16"),
    "AVX512-BF16": ({"avx512_bf16", "avx512bw", "avx512dq"}, "-mno-avx512bf16"),
    "AVX512F": ({"avx512f", "avx512bw", "avx512dq"}, "-mno-avx512f"),
    "AVX2": ({"avx2", "fma"}, "-mno-avx2"),
}


@dataclass(frozen=True)
class KernelStatus:
    """Whether the kernels compute here.

    Args:
        instruction_set: that they use, such as `AVX512-BF16`; None where they are off.
        problem: why they are off and what to do about it; None where they are on.
        compiler: that builds them; None where there is none, or they are off for another reason.
        library: that was built; None where they are off.
    """

    instruction_set: str | None
    problem: str | None
    compiler: str | None = None
    library: Path | None = None


class KernelsOff(Exception):
    """Why there are no kernels."""


def status() -> KernelStatus:
    """Whether the kernels compute here; they are built if they were not."""
    return load()[1]


@lru_cache
def load() -> tuple[ctypes.CDLL | None, KernelStatus]:
    """The library, or None where the kernels are off, and its status."""
    compiler: list[str] | None = None
    try:
        best, runtime = _best_instruction_set(), _openmp_of_torch()
        compiler = _compiler()
        path = _built(compiler, hiding_flags(best, instruction_sets()), runtime)
        library = ctypes.CDLL(str(path))
    except (KernelsOff, OSError) as problem:
        return None, KernelStatus(None, str(problem), shlex.join(compiler) if compiler else None)
    library.instruction_set.restype = ctypes.c_char_p
    return library, KernelStatus(library.instruction_set().decode(), None, shlex.join(compiler), path)


def _best_instruction_set() -> str:
    """The best that the processor has, and lets us use.

    Raises:
        KernelsOff: they are turned off, or there are none for this machine.
    """
    if os.environ.get("BULEYEAN_KERNELS") == "0":
        raise KernelsOff("turned off by BULEYEAN_KERNELS=0")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelsOff(f"there are none for {sys.platform} on {platform.machine()}, only for Linux on x86-64")
    best = instruction_sets()
    if best[:1] == ["AMX"] and not _request_amx():
        best = best[1:]
    if not best:
        raise KernelsOff("the processor has no AVX2")
    return best[0]


def instruction_sets() -> list[str]:
    """Those of the kernels' that the processor has, best first."""
    features = set(_processor()[1].split())
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if features >= needed]


def hiding_flags(name: str, among: Iterable[str]) -> list[str]:
    """What keeps a compiler from better instruction sets, of those it would use otherwise."""
    return [INSTRUCTION_SETS[better][1] for better in takewhile(lambda other: other != name, among)]


@lru_cache
def _processor() -> tuple[str, str]:
    """Its model and its features."""
    path = Path("/proc/cpuinfo")  # of Linux
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields = [next((line for line in lines if line.startswith(name)), ":") for name in ("model name", "flags")]
    model, features = (line.split(":", 1)[1].strip() for line in fields)
    return model, features


def _request_amx() -> bool:
    """Whether this process may use AMX, which Linux has to be asked."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    compiler = shlex.split(named) if named else [next(filter(shutil.which, ("gcc", "cc", "clang")), "")]
    if not compiler or not all(compiler):
        raise KernelsOff("no C compiler: install gcc")
    if not shutil.which(compiler[0]):
        raise KernelsOff(f"no C compiler {compiler[0]}, which CC names: install it, or unset CC")
    return compiler


def _openmp_of_torch() -> Path:
    """The OpenMP library inside torch's wheel: the threads of a second one would fight torch's for the cores."""
    package = Path(torch.__file__).parent
    libraries = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    if not libraries:
        raise KernelsOff("this torch brings no OpenMP library of its own, as pip's does: install torch by pip")
    return libraries[0]


def _built(compiler: list[str], hiding: list[str], runtime: Path) -> Path:
    """The compiled library, from the cache if it was built before."""
    flags = ("-march=native", *FLAGS, *hiding, *shlex.split(os.environ.get("BULEYEAN_KERNEL_FLAGS", "")))
    programs = [Path(path) for word in compiler if (path := shutil.which(word))]
    versions = [(str(path), path.stat().st_mtime_ns) for path in programs]
    digest = hashlib.sha256(repr((_processor(), compiler, versions, flags, str(runtime), torch.__version__)).encode())
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    folder = cache_folder() / "kernels"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid not in (os.getuid(), 0) or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelsOff(f"others may write to {folder}: remove it, or set XDG_CACHE_HOME to a folder of your own")
    if not library.exists():
        with temporary_folder(library) as built:
            _compile(compiler, flags, built, runtime).replace(library)
    return library


def _compile(compiler: list[str], flags: tuple[str, ...], folder: Path, runtime: Path) -> Path:
    """Compile and link in a folder; -fopenmp only compiles, for it would link the compiler's own OpenMP."""
    sources, library = sorted(FOLDER.glob("*.c")), folder / "kernels.so"
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    commands = [[*flags, "-c", str(path), "-o", to] for path, to in zip(sources, objects, strict=True)]
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: _run([*compiler, *command]), commands))
    _run([*compiler, "-shared", *sanitizers, *objects, str(runtime), "-lm", "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError as problem:
        lines = [line for line in problem.stderr.splitlines() if "error" in line] or problem.stderr.splitlines()
        raise KernelsOff(f"{command[0]} fails: {lines[0] if lines else f'status {problem.returncode}'}") from problem
    except subprocess.TimeoutExpired as problem:
        raise KernelsOff(f"{command[0]} took longer than ten minutes") from problem


def check() -> None:
    """Compile for every instruction set, whatever this processor has, warnings as errors.

    Raises:
        KernelsOff: it does not compile.
    """
    compiler, runtime = _compiler(), _openmp_of_torch()
    for name in INSTRUCTION_SETS:
        flags = ("-march=sapphirerapids", *FLAGS, "-Werror", *hiding_flags(name, INSTRUCTION_SETS))
        with tempfile.TemporaryDirectory() as folder:
            _compile(compiler, flags, Path(folder), runtime)
        print(f"{shlex.join(compiler)}: {name} compiles")


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        sys.exit("usage: python -m buleyean_rl.kernels.build --check")
    try:
        check()
    except KernelsOff as problem:
        sys.exit(str(problem))
