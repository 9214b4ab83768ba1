"""The machine a run is on: processor, versions of libraries, peak memory."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import psutil

LIBRARIES = ("buleyean-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "gguf")


def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def peak_rss_bytes() -> int:
    """The most memory this process has ever held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows, which tells it psutil
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined, unused-ignore]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


INSTRUCTION_SETS = {  # as Linux names them, and as everybody else does
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}


def available_cores() -> int:
    """Number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor, as it calls itself."""
    info = _cpuinfo()
    return info.get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those that matter for products of matrices; none where the system does not tell."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


@lru_cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}
