"""A GGUF file's weights as a transformers model's: matrices stay in their blocks, or are dequantised one by one.

    file --read_header, transformers' names--> StoredWeight: a parameter in the file --read--> blocks or numbers

Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor, nn

from buleyean_rl.errors import ModelError
from buleyean_rl.kernels.quantised import KINDS, Blocks, QuantisedTensor
from buleyean_rl.models.gguf_header import TensorInfo, check_numbers, read_header
from buleyean_rl.models.private_interfaces import gguf_names, quick_gguf_reading
from buleyean_rl.models.skeleton import LM_HEAD, build_skeleton
from buleyean_rl.models.weight_checks import check_report
from gguf import GGMLQuantizationType

# whose matrices a file has as the model has them, but for the order of rows
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


class StoredWeight(NamedTuple):
    """A parameter in a GGUF file.

    Args:
        path: of the file.
        name: in the file.
        info: where it lies.
        reorder: gives its rows the order that the model has, see `gguf_names`.
    """

    path: Path
    name: str
    info: TensorInfo
    reorder: Callable[[np.ndarray, str], np.ndarray]

    @property
    def kind(self) -> GGMLQuantizationType:
        """What its numbers are."""
        return GGMLQuantizationType(self.info.type)

    @property
    def stays_packed(self) -> bool:
        """Whether it is a matrix in blocks that the kernels read."""
        return self.kind in KINDS and len(self.info.shape) == 2

    def numbers(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Some of its rows, in fp32."""
        shape, index = self.info.shape, rows.numpy() if isinstance(rows, Tensor) else rows
        stored = self._bytes().reshape(*shape[:-1], -1)
        if len(shape) == 1:
            values = self.reorder(dequantize(stored, self.kind), self.name)[index]
        else:
            order = self.reorder(np.arange(shape[0]).reshape(-1, 1), self.name)[index, 0]
            values = dequantize(stored[order], self.kind)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def read(self, dtype: torch.dtype, *, keep_blocks: bool) -> Tensor:
        """As a model's parameter.

        Args:
            dtype: of its numbers, or of those that it is dequantised to.
            keep_blocks: of a matrix of a kind that the kernels read.
        """
        if not self.stays_packed:
            return self.numbers().to(dtype)
        packed = np.array(self.reorder(self._bytes().reshape(self.info.shape[0], -1), self.name))
        weight = QuantisedTensor([Blocks(self.kind, torch.from_numpy(packed))], dtype)
        return weight if keep_blocks else weight.dequantise()

    def _bytes(self) -> np.ndarray:
        """Mapped anew each time: a mapping keeps every page that was read in this process."""
        return np.memmap(self.path, np.uint8, "r", self.info.start, (self.info.size,))


def is_known(path: Path) -> bool:
    """Whether a GGUF file's weights are read here, and not by transformers."""
    return read_header(path).architecture in ARCHITECTURES


def stored_weights(path: Path, skeleton: Any) -> dict[str, StoredWeight]:
    """A model's parameters in a GGUF file, by their names in transformers.

    Args:
        path: the file, which `is_known`.
        skeleton: the model, see `build_skeleton`.
    """
    header = read_header(path)
    with quick_gguf_reading():
        names, reorder = gguf_names(skeleton, header.architecture)
    tensors = {name: StoredWeight(path, name, info, reorder) for name, info in header.tensors.items()}
    return {names[name]: weight for name, weight in tensors.items() if name in names}


def load_gguf(path: Path, config: Any, dtype: torch.dtype, *, keep_blocks: bool) -> Any:
    """The transformers model in a GGUF file.

    Args:
        path: the file, which `is_known`.
        config: its configuration.
        dtype: of its numbers, or of those that its blocks are dequantised to.
        keep_blocks: of the matrices; they are frozen.

    Raises:
        ModelError: weights are missing, of another shape, or not finite.
    """
    check_numbers(read_header(path))
    model = build_skeleton(config, dtype, attention=None)
    stored, shapes = stored_weights(path, model), {name: tuple(p.shape) for name, p in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop(LM_HEAD, None)
    mismatched = [(name, stored[name].info.shape, shapes[name]) for name in shapes if name in stored]
    check_report(
        str(path),
        {
            "missing_keys": [name for name in shapes if name not in stored],
            "mismatched_keys": [shapes for shapes in mismatched if shapes[1] != shapes[2]],
            "unexpected_keys": [],
            "error_msgs": [],
        },
    )
    for name in shapes:
        module, leaf = name.rpartition(".")[::2]
        weight = stored[name].read(dtype, keep_blocks=keep_blocks)
        is_plain = not isinstance(weight, QuantisedTensor)
        model.get_submodule(module).register_parameter(leaf, nn.Parameter(weight, requires_grad=is_plain))
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"{path}: lacks {missing[0]}: copy or download it again")
    return model
