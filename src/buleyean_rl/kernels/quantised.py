"""Frozen matrices in GGUF's blocks: a quarter of the memory of bf16, dequantised where they are multiplied.

    rows of blocks --dequantise, some rows at a time--> a matrix in the type that computes

A `QuantisedTensor` passes for the matrix that it stands for: what torch is asked to do with one, it does with the
dequantised rows. The kernels dequantise a block at a time, as they pack it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof, byref
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from torch.utils._pytree import tree_map_only

from buleyean_rl.kernels.abi import BLOCK, PARTS, QuantisedRows, available, call
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
KINDS = (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K)  # that matrices stay in; others are dequantised once
OF_BITS = {4: Q4_1, 8: Q8_0}  # what a matrix is quantised to
NUMBERS = 1 << 22  # dequantised at a time
aten = torch.ops.aten


class Blocks(NamedTuple):
    """Rows of one kind of blocks.

    Args:
        kind: of the blocks, of `KINDS`.
        packed: bytes, a row's blocks one after the other. Shape: (rows, bytes).
    """

    kind: int
    packed: Tensor

    @property
    def width(self) -> int:
        """Numbers of a row."""
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        return self.packed.shape[1] // size * numbers

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The numbers. Shape: (rows, width)."""
        values = torch.empty(len(self.packed), self.width, dtype=dtype)
        height = max(1, NUMBERS // self.width)
        for start in range(0, len(self.packed), height):
            rows = self.packed[start : start + height]
            numbers = dequantize(rows.cpu().numpy(), GGMLQuantizationType(self.kind))
            values[start : start + len(rows)] = torch.from_numpy(np.ascontiguousarray(numbers))
        return values.to(self.packed.device)


class QuantisedTensor(Tensor):
    """A frozen matrix that is kept in blocks, possibly of several kinds one below the other.

    Args:
        parts: its rows.
        dtype: of the numbers that it is dequantised to.
        transposed: whether it is the transpose of these rows.
    """

    parts: tuple[Blocks, ...]
    transposed: bool
    _in_c: QuantisedRows | None

    @staticmethod
    def __new__(cls, parts: Sequence[Blocks], dtype: torch.dtype, transposed: bool = False) -> QuantisedTensor:
        """Shape: (rows, width), or transposed."""
        shape, strides = (sum(len(part.packed) for part in parts), parts[0].width), (parts[0].width, 1)
        if transposed:
            shape, strides = shape[::-1], strides[::-1]
        tensor: QuantisedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides, dtype=dtype, device=parts[0].packed.device
        )
        tensor.parts, tensor.transposed, tensor._in_c = tuple(parts), transposed, None
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # whose type is none
        kinds = "+".join(GGMLQuantizationType(part.kind).name for part in self.parts)
        return f"QuantisedTensor({kinds}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def data_ptr(self) -> int:
        """Where its first block is."""
        return self.parts[0].packed.data_ptr()

    @property
    def in_c(self) -> QuantisedRows:
        """Its rows as `kernels.h` has them, transposed or not; it has to outlive them."""
        if self._in_c is None:
            ends = [*accumulate(len(part.packed) for part in self.parts)]
            pointers, sizes = [p.packed.data_ptr() for p in self.parts], [p.packed.shape[1] for p in self.parts]
            columns = (pointers, [p.kind for p in self.parts], sizes, ends)
            self._in_c = QuantisedRows(*(tuple(column) for column in columns))
        return self._in_c

    @property
    def fits_kernels(self) -> bool:
        """Whether the kernels read it."""
        return len(self.parts) <= PARTS and available(self) and all(len(p.packed) % BLOCK == 0 for p in self.parts)

    def dequantise(self) -> Tensor:
        """The matrix itself."""
        if len(self.parts) <= PARTS and available(self):
            rows, width = reversed(self.shape) if self.transposed else self.shape
            matrix = torch.empty(rows, width, dtype=self.dtype)
            call("dequantise", byref(self.in_c), rows, width, matrix)
        else:
            matrix = torch.cat([part.dequantise(self.dtype) for part in self.parts])
        return matrix.T if self.transposed else matrix

    def rows(self, start: int, end: int) -> QuantisedTensor:
        """Some of the rows that are kept, whether it is their transpose or not."""
        parts, first = [], 0
        for kind, packed in self.parts:
            rows = packed[max(0, start - first) : max(0, end - first)]
            parts += [Blocks(kind, rows)] if len(rows) else []
            first += len(packed)
        return QuantisedTensor(parts or [Blocks(self.parts[0].kind, packed[:0])], self.dtype, self.transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # which torch types as the function that disables it
        cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do it with the blocks where that is known, with the dequantised matrix elsewhere."""
        with torch.inference_mode(False):  # a view made within it could be none of a tensor from before
            own = _WITH_BLOCKS.get(function)
            result = own(*args, **(kwargs or {})) if own is not None else None
            return cls._dequantise_and(function, args, kwargs or {}) if result is None else result

    @classmethod
    def _dequantise_and(cls, function: Any, args: Any, kwargs: Any) -> Any:
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, QuantisedTensor) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(f"{function}: a quantised matrix does not change")
        args, kwargs = tree_map_only(QuantisedTensor, QuantisedTensor.dequantise, (args, kwargs))
        return function(*args, **kwargs)


def quantise(weight: Tensor, bits: int) -> QuantisedTensor | None:
    """A matrix in blocks; None where its rows are no whole number of them.

    Args:
        weight: Shape: (rows, width).
        bits: 4 or 8.
    """
    kind = OF_BITS[bits]
    if weight.shape[1] % GGML_QUANT_SIZES[kind][0]:
        return None
    height = max(1, NUMBERS // weight.shape[1])
    packed = [torch.from_numpy(quantize(rows.float().numpy(), kind)) for rows in weight.detach().split(height)]
    return QuantisedTensor([Blocks(kind, torch.cat(packed))], weight.dtype)


def _copy(x: QuantisedTensor, change: Callable[[Tensor], Tensor] = lambda packed: packed) -> QuantisedTensor:
    return QuantisedTensor([Blocks(kind, change(packed)) for kind, packed in x.parts], x.dtype, x.transposed)


def _transpose(x: QuantisedTensor, *_: Any) -> QuantisedTensor:
    return QuantisedTensor(x.parts, x.dtype, not x.transposed)


def _clone(x: QuantisedTensor, **_: Any) -> QuantisedTensor | None:
    return None if x.transposed else _copy(x, Tensor.clone)


def _new(x: QuantisedTensor, size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """Zeros of its type: nothing of it is read."""
    return torch.zeros(*size, dtype=dtype or x.dtype, device=x.device)


def _to_copy(x: QuantisedTensor, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> QuantisedTensor:
    moved = _copy(x, lambda packed: packed.to(device or packed.device))
    return QuantisedTensor(moved.parts, dtype or x.dtype, x.transposed)


def _concatenate(matrices: Sequence[Tensor], dim: int = 0) -> QuantisedTensor | None:
    """One below the other, nothing is copied."""
    parts: list[Blocks] = []
    for matrix in matrices:
        if not isinstance(matrix, QuantisedTensor) or matrix.transposed or dim not in (0, -2):
            return None
        parts += matrix.parts
    return QuantisedTensor(parts, matrices[0].dtype)


def _slice(x: QuantisedTensor, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1) -> Any:
    if x.transposed or dim != 0 or step != 1:
        return None
    first, last, _ = slice(start, end).indices(len(x))
    return x.rows(first, last)


def _take(x: QuantisedTensor, ids: Tensor) -> Tensor:
    """Rows by their numbers. Shapes: (...) to (..., width)."""
    flat, first = ids.reshape(-1), 0
    taken = torch.empty(len(flat), x.shape[1], dtype=x.dtype, device=x.device)
    for kind, packed in x.parts:
        here = ((flat >= first) & (flat < first + len(packed))).nonzero()[:, 0]
        taken[here] = QuantisedTensor([Blocks(kind, packed[flat[here] - first])], x.dtype).dequantise()
        first += len(packed)
    return taken.view(*ids.shape, x.shape[1])


def _index(x: QuantisedTensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    rows = indices[0]
    if x.transposed or len(indices) != 1 or rows is None or rows.dtype != torch.long:
        return None
    return _take(x, torch.where(rows < 0, rows + len(x), rows))


def _embed(x: QuantisedTensor, ids: Tensor, *_: Any) -> Tensor:
    return _take(x, ids)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b, some rows of the blocks at a time: of the result, or of sums in fp32. Shapes: (n, k), (k, m)."""
    blocks = a if isinstance(a, QuantisedTensor) else b
    assert isinstance(blocks, QuantisedTensor)
    rows = blocks.shape[1 if blocks.transposed else 0]
    height = max(1, 8 * NUMBERS // blocks.parts[0].width)
    if rows <= height or (isinstance(a, QuantisedTensor) and isinstance(b, QuantisedTensor)):
        return torch.mm(*(x.dequantise() if isinstance(x, QuantisedTensor) else x for x in (a, b)))
    slices = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
    parts = (blocks.rows(part.start, part.stop).dequantise() for part in slices)
    if blocks is a and not blocks.transposed:
        return torch.cat([part @ b for part in parts])
    if blocks is b and blocks.transposed:
        return torch.cat([a @ part for part in parts], 1)
    sums = torch.zeros(len(a), b.shape[1], dtype=torch.promote_types(blocks.dtype, torch.float32), device=blocks.device)
    for part, matrix in zip(slices, parts, strict=True):
        sums += matrix @ b[part] if blocks is a else a[:, part] @ matrix
    return sums.to(blocks.dtype)


def _add_multiply(added: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor | None:
    return added + _multiply(a, b) if (alpha, beta) == (1, 1) else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _multiply(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# Each returns None for what it leaves to the dequantised matrix.
_WITH_BLOCKS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _copy,
    aten.alias.default: _copy,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.new_zeros.default: _new,
    aten.new_empty.default: _new,
    aten.cat.default: _concatenate,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.embedding.default: _embed,
    aten.mm.default: _multiply,
    aten.addmm.default: _add_multiply,
    aten.linear.default: _linear,
}


def quantised_address(x: Tensor) -> int | None:
    """Where the blocks of a matrix are described for C; None if it is none in blocks."""
    return addressof(x.in_c) if isinstance(x, QuantisedTensor) else None


def stored_bytes(x: Tensor) -> int:
    """The memory that a matrix takes."""
    return sum(part.packed.numel() for part in x.parts) if isinstance(x, QuantisedTensor) else x.nbytes
