"""Tensors that are read when they are needed, a few rows at a time, in fp32.

A `Rows` knows its shape and how to read any of its rows; nothing is in memory until `read`. What an export
does to a weight (merge an adapter into it, permute it, add one to it) wraps one `Rows` in another, so a model of
any size goes from disk to disk in blocks of `BLOCK` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import gguf

BLOCK = 1 << 22  # numbers in memory at a time: 16 MB in fp32

Index = slice | Tensor  # rows from..to, or row numbers; Shape: (rows,)


@dataclass(frozen=True)
class Rows:
    """A tensor somewhere else.

    Args:
        shape: in torch's order, rows first.
        read: fp32 copies of some of its rows, on the CPU.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, as many at a time as make up `BLOCK` numbers."""
        height = max(1, BLOCK * self.shape[0] // max(1, self.numel))
        for start in range(0, self.shape[0], height):
            yield self.read(slice(start, min(start + height, self.shape[0])))

    def whole(self) -> Tensor:
        """All of it, filled in block by block."""
        result = torch.empty(self.shape)
        at = 0
        for block in self.blocks():
            result[at : at + len(block)] = block
            at += len(block)
        return result

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape))


def in_memory(tensor: Tensor) -> Rows:
    """A tensor that is in memory already, on any device, in any dtype."""
    source = tensor.detach()

    def read(index: Index) -> Tensor:
        rows = source[index if isinstance(index, slice) else index.to(source.device)]
        return rows.to(device="cpu", dtype=torch.float32, copy=True)

    return Rows(tuple(tensor.shape), read)


def in_safetensors(path: Path) -> dict[str, Rows]:
    """The tensors of a safetensors file by name.

    The file is opened anew for every read: an open one keeps every page it ever read in this process.
    """

    def reader(name: str) -> Callable[[Index], Tensor]:
        def read(index: Index) -> Tensor:
            with safe_open(path, framework="pt") as file:
                rows = file.get_slice(name)[index] if isinstance(index, slice) else file.get_tensor(name)[index]
                return rows.to(dtype=torch.float32, copy=True)

        return read

    with safe_open(path, framework="pt") as file:
        return {name: Rows(tuple(file.get_slice(name).get_shape()), reader(name)) for name in file.keys()}  # noqa: SIM118


def in_gguf(tensor: Any) -> Rows:
    """A tensor of a `gguf.GGUFReader`, dequantised as it is read."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    offset, stored, data = int(tensor.data_offset), tensor.tensor_type, tensor.data
    path, dtype, layout = data.filename, data.dtype, data.shape

    def read(index: Index) -> Tensor:
        # The reader's own map would keep every page it ever read in this process.
        packed = np.memmap(path, mode="r", dtype=dtype, offset=offset, shape=layout)
        rows = packed[index if isinstance(index, slice) else index.numpy()]
        values = gguf.quants.dequantize(np.ascontiguousarray(rows), stored)
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(-1, *shape[1:]))

    return Rows(shape, read)


def with_lora(base: Rows, a: Rows, b: Rows, scaling: float) -> Rows:
    """`base + scaling b a`. Shape: base (out, in), a (rank, in), b (out, rank)."""

    def read(index: Index) -> Tensor:
        return base.read(index).addmm_(b.read(index), a.whole(), alpha=scaling)

    return Rows(base.shape, read)


def reordered(base: Rows, order: Tensor) -> Rows:
    """The rows of `base` in another order. Shape: order (rows,)."""
    return Rows(base.shape, lambda index: base.read(order[index]))


def shifted(base: Rows, by: float) -> Rows:
    """`base + by`."""
    return Rows(base.shape, lambda index: base.read(index).add_(by))


def scaled(base: Rows, by: float) -> Rows:
    """`base * by`."""
    return Rows(base.shape, lambda index: base.read(index).mul_(by))
