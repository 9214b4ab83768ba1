"""K-quants: two to six bits in blocks of 256, mixed by llama.cpp's own recipes.

The `gguf` package reads them and cannot make them; llama.cpp's `llama_model_quantize` can, and the extra
`llama-cpp` brings it. It runs in another process: llama.cpp answers what it does not expect by aborting.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from buleyean_rl.errors import ExportError
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

K_QUANTS = {
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q5_k_s": LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": LlamaFileType.MOSTLY_Q4_K_S,
    "q3_k_l": LlamaFileType.MOSTLY_Q3_K_L,
    "q3_k_m": LlamaFileType.MOSTLY_Q3_K_M,
    "q3_k_s": LlamaFileType.MOSTLY_Q3_K_S,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
}
INSTALL = "pip install 'buleyean-rl[llama-cpp]' (it compiles for some minutes)"

_PROGRAM = """
import ctypes, sys
import llama_cpp
source, target, kind, room = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(kind)
if hasattr(settings, "max_buf_size"):
    settings.max_buf_size = int(room)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)) != 0)
"""
_ROOM = 256 << 20  # bytes of rows llama.cpp may hold at a time, where it lets itself be told


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_installed(quant: str) -> None:
    """Refuse a quantisation that needs what is not installed.

    Raises:
        ExportError: with the command that installs it.
    """
    if not installed():
        raise ExportError(f"{quant} is made by llama.cpp itself, through llama-cpp-python: {INSTALL}")


def quantise_file(source: Path, target: Path, quant: str) -> None:
    """Quantise a GGUF file in another process.

    Args:
        source: in full precision.
        target: written by llama.cpp.
        quant: one of `K_QUANTS`.

    Raises:
        ExportError: llama-cpp-python is missing, or llama.cpp failed or aborted; with its last words.
    """
    check_installed(quant)
    words = [sys.executable, "-c", _PROGRAM, str(source), str(target), str(int(K_QUANTS[quant])), str(_ROOM)]
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        how = f"was stopped by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise ExportError(f"llama.cpp {how} while making {quant}: {said[-1].strip() if said else 'it said nothing'}")


def quantise_rows(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows in llama.cpp's own quantisation, as `quantise_file` stores them. Shape: (rows, width), bytes out."""
    block, size = GGML_QUANT_SIZES[kind]
    rows, width = values.shape
    if width % block:
        raise ExportError(f"rows of {width} numbers cannot be stored as {kind.name}")
    packed = np.empty((rows, width // block * size), dtype=np.uint8)
    source = np.ascontiguousarray(values, dtype=np.float32)
    written = _ggml().ggml_quantize_chunk(
        int(kind), source.ctypes.data, packed.ctypes.data, 0, rows, width, ctypes.c_void_p(None)
    )
    if written != packed.nbytes:
        raise ExportError(f"llama.cpp wrote {written} bytes of {kind.name} and {packed.nbytes} were expected")
    return packed


@cache
def _ggml() -> Any:
    """The library below llama.cpp that llama-cpp-python brings."""
    check_installed("this quantisation")
    libraries = [file for file in importlib.metadata.files("llama-cpp-python") or [] if "ggml-base" in file.name]
    if not libraries:
        raise ExportError(f"llama-cpp-python came without ggml's library; install it again: {INSTALL}")
    found = libraries[0].locate()
    library = ctypes.CDLL(str(found))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library
