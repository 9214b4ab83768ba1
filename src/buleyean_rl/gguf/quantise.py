"""How tensors are stored: which type each gets, and its bytes. Pure functions.

name, shape, type of the file --storage_type--> type of the tensor --quantise--> bytes, a block of rows at a time
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import gguf
from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.k_quants import quantise_rows
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

QUANTS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

# The `gguf` package reads these but cannot make them.
_K_TYPES = {GGMLQuantizationType[f"Q{bits}_K"] for bits in (2, 3, 4, 5, 6)} | {GGMLQuantizationType.IQ4_NL}

# At four and five bits the embeddings lose more than the file gains: they get eight.
_COARSE = {GGMLQuantizationType[q.upper()] for q in ("q4_0", "q4_1", "q5_0", "q5_1")}
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def storage_type(name: str, shape: tuple[int, ...], file_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type a tensor is stored in: vectors in F32, widths that do not fit the file's type in F16.

    Args:
        name: in GGUF.
        shape: rows first.
        file_type: of the file's matrices.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if file_type in _COARSE and name in _EMBEDDINGS:
        file_type = GGMLQuantizationType.Q8_0
    block, _ = GGML_QUANT_SIZES[file_type]
    return file_type if shape[-1] % block == 0 else GGMLQuantizationType.F16


def stored_bytes(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> int:
    """The number of bytes a tensor takes in the file."""
    block, size = GGML_QUANT_SIZES[tensor_type]
    return int(np.prod(shape)) // block * size


def quantise(rows: Tensor, tensor_type: GGMLQuantizationType) -> np.ndarray:
    """Rows of a tensor as the file stores them. Shape: (rows, width), packed rows out.

    Raises:
        ExportError: values that are not finite, or that half precision cannot hold.
    """
    values = rows.to(device="cpu", dtype=torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ExportError("a tensor holds NaN or infinity: the training diverged")
    if tensor_type is GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError("a tensor has values too large for f16: export bf16 or q8_0")
    return quantise_rows(values, tensor_type) if tensor_type in _K_TYPES else gguf.quants.quantize(values, tensor_type)
