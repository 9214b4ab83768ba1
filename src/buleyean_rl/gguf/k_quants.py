"""K-quants: two to six bits in blocks of 256, mixed by llama.cpp's own recipes.

    F32 file --llama_model_quantize, another process--> K-quant file
    rows --ggml_quantize_chunk--> the same bytes, which the parity gate compares

The `gguf` package reads K-quants and cannot make them; the extra `llama-cpp` can. A file is quantised in another
process because llama.cpp aborts on what it does not expect.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.private_interfaces import QUANTISE_PROGRAM, load_ggml
from buleyean_rl.gguf.program import run_program
from buleyean_rl.inference.llama_cpp_python import INSTALL_HINT, is_installed
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
_BUFFER_BYTES = 256 << 20  # of rows llama.cpp may hold at a time, where its binding has the setting


def check_installed(quant: str) -> None:
    """Raise ExportError, with the command that installs it, if llama-cpp-python is missing."""
    if not is_installed():
        raise ExportError(f"{quant} is made by llama.cpp itself, through llama-cpp-python: {INSTALL_HINT}")


def quantise_file(source: Path, target: Path, quant: str) -> None:
    """Quantise a GGUF file in another process.

    Args:
        source: in full precision.
        target: written by llama.cpp.
        quant: one of `K_QUANTS`.

    Raises:
        ExportError: llama-cpp-python is missing, or llama.cpp failed or aborted; with the last line it printed.
    """
    check_installed(quant)
    arguments = [str(source), str(target), str(int(K_QUANTS[quant])), str(_BUFFER_BYTES)]
    run_program([sys.executable, "-c", QUANTISE_PROGRAM, *arguments], "llama.cpp", f" while making {quant}")


def quantise_rows(values: np.ndarray, tensor_type: GGMLQuantizationType) -> np.ndarray:
    """Rows in llama.cpp's own quantisation, as `quantise_file` stores them. Shape: (rows, width), bytes out."""
    block, size = GGML_QUANT_SIZES[tensor_type]
    rows, width = values.shape
    if width % block:
        raise ExportError(f"rows of {width} numbers cannot be stored as {tensor_type.name}")
    check_installed("this quantisation")
    packed = np.empty((rows, width // block * size), dtype=np.uint8)
    source = np.ascontiguousarray(values, dtype=np.float32)
    written = load_ggml().ggml_quantize_chunk(
        int(tensor_type), source.ctypes.data, packed.ctypes.data, 0, rows, width, ctypes.c_void_p(None)
    )
    if written != packed.nbytes:
        raise ExportError(f"llama.cpp wrote {written} bytes of {tensor_type.name} and {packed.nbytes} were expected")
    return packed
