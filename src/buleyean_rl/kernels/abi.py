"""The C library's interface: structs, signatures, and calls by name."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from buleyean_rl.kernels import build

STEP = 32  # what the sizes of matrices in tiles are multiples of
SIGNATURES = {
    "column_most": [c_void_p, c_int64, c_int64, c_void_p, c_int],
    "softmax_sums": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_int],
    "causal_softmax": [c_void_p, *[c_int64] * 4, c_int],
    "softmax_backward": [c_void_p, c_void_p, c_int64, c_int64, c_int],
    "rms_norm": [c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int],
    "rms_norm_backward": [*[c_void_p] * 4, c_int64, c_int64, c_float, c_void_p, c_void_p, c_int],
    "swiglu": [c_void_p, *[c_int64] * 3, c_void_p, c_int],
    "swiglu_backward": [c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_int],
    "rotate": [
        *[c_void_p, c_int64, c_int64, c_void_p, c_void_p],
        *[c_int64, c_int64, c_int64, c_int, c_void_p, c_int64, c_int64, c_int],
    ],
    "dropout": [c_void_p, c_int64, c_float, c_uint32, c_int, c_void_p, c_int],
    "softmax_gradient": [c_void_p, c_void_p, *[c_int64] * 3, c_float, *[c_void_p] * 4, c_int],
}
PARTS = 3  # that a linear layer is of at most


class Matrix(ctypes.Structure):
    """Of `passes.h`."""

    _fields_ = (("at", c_void_p), ("row", c_int64), ("column", c_int64))


class Linear(ctypes.Structure):
    """Of `passes.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "a", "b")),
        *((name, c_int64) for name in ("depth", "columns", "apart", "rank")),
        ("p", c_float),
        ("seed", c_uint32),
        ("parts", c_int64),
        ("ranks", c_int64 * PARTS),
        ("outputs", c_int64 * PARTS),
        ("scalings", c_float * PARTS),
    )

    def with_dropout(self, p: float, seed: int) -> Linear:
        """The same, but a share of its input is dropped on the way to the adapter, as a seed below 2^32 says."""
        copy = Linear.from_buffer_copy(self)
        copy.p, copy.seed = p, seed
        return copy

    @property
    def learning(self) -> int:
        """How many numbers its adapters have."""
        return sum(self.ranks[i] * (self.depth + self.outputs[i]) for i in range(self.parts))


class Heads(ctypes.Structure):
    """Of `passes.h`."""

    _fields_ = (("at", c_void_p), *((name, c_int64) for name in ("heads", "tokens", "head", "token")))

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        """A (heads, tokens, width)."""
        assert x.stride(-1) == 1
        return cls(x.data_ptr(), *x.shape[:2], *x.stride()[:2])


class CuSeqlensStruct(ctypes.Structure):
    """Of `kernels.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("places", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, c_int64) for name in ("count", "max_seqlen_q")),
    )


ATTENDING = [c_int64, CuSeqlensStruct, c_float]
OF_BF16 = {  # `product` and `row_products` are called from C, and by tests
    "has_tiles": [],
    "product": [*[Matrix, Matrix, c_int64] * 2, c_void_p, c_void_p, *[c_int64] * 3, c_int],
    "copy_adapters": [c_void_p, c_int64, c_void_p, c_int],
    "adapted": [ctypes.POINTER(Linear), c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "adapted_backward": [ctypes.POINTER(Linear), *[c_void_p] * 3, c_int64, c_void_p, c_void_p, c_int],
    "head_sums": [
        *[c_void_p, c_int64, c_int64, c_void_p, c_int64, c_float],
        *[c_void_p, c_void_p, c_int64, *[c_void_p] * 3, c_int],
    ],
    "row_products": [*[c_void_p, c_int64] * 2, *[c_int64] * 3, c_void_p, c_int],
    "attention": [*[Heads] * 4, c_void_p, *ATTENDING, c_int],
    "attention_backward": [*[Heads] * 4, c_void_p, Heads, *ATTENDING, *[Heads] * 3, c_int],
    "layers": [c_void_p, c_int64, *[c_void_p] * 3, c_int],
    "layers_backward": [c_void_p, c_int64, *[c_void_p] * 4, c_int, c_void_p, c_int],
}


def available(*tensors: Tensor) -> bool:
    """Whether the functions of this module can be used, on these tensors."""
    dtype = tensors[0].dtype
    alike = all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)
    return alike and dtype in build.SOURCES and _library(dtype) is not None


def _has_tiles() -> bool:
    return _tiles() > 0


def _has_matrix_registers() -> bool:
    return _tiles() > 1


@lru_cache
def _tiles() -> int:
    library = _library(torch.bfloat16)
    return 0 if library is None else int(library.has_tiles())


def _call(name: str, x: Tensor, *others: Tensor | float | None) -> None:
    """A function of the library for tensors like `x`, its first argument."""
    _call_in(x.dtype, name, x, *others)


def _call_in(dtype: torch.dtype, name: str, *arguments: Any) -> None:
    library = _library(dtype)
    assert library is not None
    getattr(library, name)(*[each.data_ptr() if isinstance(each, Tensor) else each for each in arguments])


@lru_cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions for tensors of a type, or None where they cannot be built."""
    library = build.library(dtype)
    if library is None:
        return None
    for name, arguments in (SIGNATURES | (OF_BF16 if dtype == torch.bfloat16 else {})).items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int if name == "has_tiles" else None
    return library
