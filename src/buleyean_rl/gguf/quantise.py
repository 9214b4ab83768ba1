"""How tensors are stored: which type each gets, and the bytes of it. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import gguf
from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.k_quants import quantise_rows
from buleyean_rl.gguf.tensors import Rows
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

# What the `gguf` package reads but cannot make.
_LLAMA_CPPS = {GGMLQuantizationType[f"Q{bits}_K"] for bits in (2, 3, 4, 5, 6)} | {GGMLQuantizationType.IQ4_NL}

# Four and five bits cost the embeddings more than they save: they stay at eight.
_COARSE = {GGMLQuantizationType[q.upper()] for q in ("q4_0", "q4_1", "q5_0", "q5_1")}
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def storage_type(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor is stored when the file is of type `kind`: vectors and norms in full, odd widths in F16.

    Args:
        name: in GGUF.
        shape: rows first.
        kind: of the file.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind in _COARSE and name in _EMBEDDINGS:
        kind = GGMLQuantizationType.Q8_0
    block, _ = GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def stored_bytes(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    """How many bytes a tensor takes in the file."""
    block, size = GGML_QUANT_SIZES[stored]
    return int(np.prod(shape)) // block * size


def quantise(block: Tensor, stored: GGMLQuantizationType) -> np.ndarray:
    """Rows of a tensor as the file stores them.

    Raises:
        ExportError: values that are not finite, or that half precision cannot hold.
    """
    values = block.to(device="cpu", dtype=torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ExportError("a tensor holds NaN or infinity: the training diverged")
    if stored is GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError("a tensor has values too large for f16: export bf16 or q8_0")
    return quantise_rows(values, stored) if stored in _LLAMA_CPPS else gguf.quants.quantize(values, stored)


def quantised(rows: Rows, stored: GGMLQuantizationType) -> Iterator[np.ndarray]:
    """A tensor as the file stores it, block by block."""
    return (quantise(block, stored) for block in rows.blocks())
