"""The C sources here as libraries, built with the machine's own compiler on first use, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from buleyean_rl.system.cache import cache_folder

FOLDER = Path(__file__).parent / "c"
HEADERS = ("bf16.h", "kernels.h", "simd.h", "tile.h")
SOURCES = {  # and the flags that say which type
    torch.float32: (("elementwise.c",), ("-DFP32",)),
    torch.bfloat16: (
        ("elementwise.c", "tile.c", "gemm.c", "lora_linear.c", "head_softmax.c", "attention.c", "decoder_layer.c"),
        (),
    ),
}
X86 = ("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()  # compilers take 256
FLAGS = (
    "-std=c11",
    "-O3",
    "-march=native",
    *X86,
    "-ffast-math",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
)


@dataclass(frozen=True)
class KernelStatus:
    """Whether the kernels compute here.

    Args:
        instruction_set: that they use, such as `AVX512-BF16`; None where they are off.
        problem: why they are off and what to do about it; None where they are on.
    """

    instruction_set: str | None
    problem: str | None


def status() -> KernelStatus:
    """Whether the kernels compute here; they are built if they were not."""
    if library(torch.bfloat16) is None:
        return KernelStatus(None, "no C compiler: install gcc or clang")
    if torch.cpu._is_amx_tile_supported():
        return KernelStatus("AMX", None)
    if torch.cpu._is_avx512_bf16_supported():
        return KernelStatus("AVX512-BF16", None)
    return KernelStatus("AVX2", None)


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The one for tensors of a type, one of `SOURCES`; None without a compiler, or without torch's own OpenMP."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    runtime = _openmp_of_torch()
    if compiler is None or runtime is None:
        return None
    names, flags = SOURCES[dtype]
    sources = [FOLDER / name for name in (*HEADERS, *names)]
    try:
        return ctypes.CDLL(str(_built(compiler, (*FLAGS, *flags), sources, runtime)))
    except (OSError, subprocess.SubprocessError):
        return None


def _openmp_of_torch() -> Path | None:
    """The OpenMP library inside torch's wheel: the threads of a second one would fight torch's for the cores."""
    package = Path(torch.__file__).parent
    found = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    return found[0] if found else None


def _built(compiler: str, flags: tuple[str, ...], sources: list[Path], runtime: Path) -> Path:
    """The compiled library, from the cache if this source was compiled for this kind of processor before."""
    target = _run(compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)  # names every instruction set
    source = b"".join(path.read_bytes() for path in sources)
    key = hashlib.sha256(source + target + f"{compiler} {flags} {runtime}".encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            units, linked = [path for path in sources if path.suffix == ".c"], Path(folder, "kernels.so")
            compiled = [str(Path(folder, path.stem).with_suffix(".o")) for path in units]
            for path, to in zip(units, compiled, strict=True):
                _run(compiler, *flags, "-c", str(path), "-o", to)
            # apart, as linking with -ffast-math would flush denormal numbers in the whole process
            _run(compiler, "-shared", *compiled, str(runtime), "-lm", "-o", str(linked))
            linked.replace(library)
    return library


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
