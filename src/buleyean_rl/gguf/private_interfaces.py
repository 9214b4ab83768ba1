"""Interfaces of other packages that they do not document, all in one place.

    gguf >=0.19,<1           how GGUFWriter streams to its file; that GGUFReader maps the file; the size label
    transformers >=5.24,<6   the table of rotary frequencies
    llama-cpp-python >=0.3   `llama_model_quantize` of its C binding; ggml's shared library in its wheel

A new version of one of them is checked here and nowhere else.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.utility import model_weight_count_rounded_notation

from buleyean_rl.errors import ExportError
from buleyean_rl.inference.llama_cpp_python import INSTALL_HINT

# Run in a process of its own: SOURCE TARGET FILE_TYPE BUFFER_BYTES
QUANTISE_PROGRAM = """
import ctypes, sys
import llama_cpp
source, target, file_type, buffer_bytes = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(file_type)
if hasattr(settings, "max_buf_size"):
    settings.max_buf_size = int(buffer_bytes)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)) != 0)
"""


# --- gguf --------------------------------------------------------------------------------------------------


def write_head(writer: Any, path: Path) -> None:
    """Write everything of a GGUF file but the tensors' numbers."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pad(writer)


def append(writer: Any, data: np.ndarray) -> None:
    """Append packed rows to the tensor that is being written."""
    data.tofile(writer.fout[0])


def pad(writer: Any) -> None:
    """Fill up to where the next tensor begins."""
    output = writer.fout[0]
    writer.write_padding(output, output.tell())


def read_packed_rows(tensor: Any) -> Callable[[slice | np.ndarray], np.ndarray]:
    """A function that reads packed rows of a `GGUFReader`'s tensor.

    It maps the file anew for every read: the reader's own map keeps every page it ever read in this process.
    """
    offset, path, dtype, shape = int(tensor.data_offset), tensor.data.filename, tensor.data.dtype, tensor.data.shape

    def read(index: slice | np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.memmap(path, mode="r", dtype=dtype, offset=offset, shape=shape)[index])

    return read


def size_label(parameters: int) -> str:
    """A number of parameters as model names write it, such as 135M."""
    return str(model_weight_count_rounded_notation(parameters, 1))


# --- transformers ------------------------------------------------------------------------------------------


def rope_frequencies(config: Any, rope_type: str) -> tuple[torch.Tensor, float]:
    """transformers' own rotary frequencies, and what it scales attention by. Shape: (head_dim / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention_scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    return frequencies, float(attention_scale)


# --- llama-cpp-python --------------------------------------------------------------------------------------


@cache
def load_ggml() -> Any:
    """The library below llama.cpp that llama-cpp-python brings.

    Raises:
        ExportError: it is not in the wheel.
    """
    libraries = [file for file in importlib.metadata.files("llama-cpp-python") or [] if "ggml-base" in file.name]
    if not libraries:
        raise ExportError(f"llama-cpp-python came without ggml's library; install it again: {INSTALL_HINT}")
    library = ctypes.CDLL(str(libraries[0].locate()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source
        ctypes.c_void_p,  # target
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # elements a row
        ctypes.c_void_p,  # importance matrix
    ]
    return library
