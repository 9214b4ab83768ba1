"""Tensors that are read when they are needed, a few rows at a time, in fp32.

    safetensors, GGUF or memory --> LazyTensor --add_lora, permute_rows, shift, scale--> LazyTensor --blocks--> writer

A `LazyTensor` has a shape and a function that reads any of its rows. What an export does to a weight wraps one lazy
tensor in another, so a model of any size goes from disk to disk in blocks of `BLOCK` numbers.
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
from buleyean_rl.gguf.private_interfaces import read_packed_rows

BLOCK = 1 << 22  # numbers in memory at a time: 16 MB in fp32

Index = slice | Tensor  # a range of rows, or row numbers; Shape: (rows,)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory.

    Args:
        shape: in torch's order, rows first.
        read: returns fp32 copies of some of its rows, on the CPU.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """Read all rows in order, as many at a time as make up `BLOCK` numbers."""
        height = max(1, BLOCK * self.shape[0] // max(1, self.numel))
        for start in range(0, self.shape[0], height):
            yield self.read(slice(start, min(start + height, self.shape[0])))

    def read_all(self) -> Tensor:
        """Read the whole tensor, block by block."""
        result = torch.empty(self.shape)
        start = 0
        for block in self.blocks():
            result[start : start + len(block)] = block
            start += len(block)
        return result

    @property
    def numel(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))


def wrap_tensor(tensor: Tensor) -> LazyTensor:
    """A torch tensor on any device, in any dtype, as a lazy one."""
    source = tensor.detach()

    def read(index: Index) -> Tensor:
        rows = source[index if isinstance(index, slice) else index.to(source.device)]
        return rows.to(device="cpu", dtype=torch.float32, copy=True)

    return LazyTensor(tuple(tensor.shape), read)


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
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
        names = file.keys()
        return {name: LazyTensor(tuple(file.get_slice(name).get_shape()), reader(name)) for name in names}


def open_gguf_tensor(tensor: Any) -> LazyTensor:
    """A tensor of a `gguf.GGUFReader`, dequantised as it is read."""
    shape, tensor_type, read_rows = torch_shape(tensor), tensor.tensor_type, read_packed_rows(tensor)

    def read(index: Index) -> Tensor:
        rows = read_rows(index if isinstance(index, slice) else index.numpy())
        values = gguf.quants.dequantize(rows, tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(-1, *shape[1:]))

    return LazyTensor(shape, read)


def torch_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a `gguf.GGUFReader`'s tensor in torch's order: GGUF counts dimensions from the last."""
    return tuple(int(size) for size in reversed(tensor.shape))


def add_lora(base: LazyTensor, a: LazyTensor, b: LazyTensor, scaling: float) -> LazyTensor:
    """`base + scaling b a`. Shape: base (out, in), a (rank, in), b (out, rank)."""

    def read(index: Index) -> Tensor:
        return base.read(index).addmm_(b.read(index), a.read_all(), alpha=scaling)

    return LazyTensor(base.shape, read)


def permute_rows(base: LazyTensor, order: Tensor) -> LazyTensor:
    """The rows of `base` in another order. Shape: order (rows,)."""
    return LazyTensor(base.shape, lambda index: base.read(order[index]))


def shift(base: LazyTensor, by: float) -> LazyTensor:
    """`base + by`."""
    return LazyTensor(base.shape, lambda index: base.read(index).add_(by))


def scale(base: LazyTensor, by: float) -> LazyTensor:
    """`base * by`."""
    return LazyTensor(base.shape, lambda index: base.read(index).mul_(by))
