"""The C library's interface, as `kernels.h` has it: structs, signatures, and calls by name."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from buleyean_rl.kernels import build

BLOCK = 32  # what the sizes of matrices are multiples of
PARTS = 3  # that a linear layer is of at most


def _pointers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_void_p) for name in names)


def _sizes(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_int64) for name in names)


class QuantisedRows(ctypes.Structure):
    """Rows in GGUF's blocks, of up to three kinds."""

    _fields_ = (
        ("data", c_void_p * PARTS),
        ("kinds", c_int64 * PARTS),
        ("bytes", c_int64 * PARTS),
        ("ends", c_int64 * PARTS),
    )


class Matrix(ctypes.Structure):
    """A matrix with the strides of its rows and columns; where it begins, if it is quantised."""

    _fields_ = (
        *_pointers("data"),
        *_sizes("rows", "columns", "row_stride", "column_stride"),
        *_pointers("quantised"),
        *_sizes("first_row", "first_column"),
    )


class GemmArgs(ctypes.Structure):
    """Of `gemm`."""

    _fields_ = (
        *((name, Matrix) for name in ("a", "b", "a2", "b2")),
        *_pointers("added", "y", "c"),
        *_sizes("y_stride", "added_stride"),
    )


class Linear(ctypes.Structure):
    """A linear layer with its adapter, of one to three parts side by side."""

    _fields_ = (
        *_pointers("weight", "bias", "a", "b"),
        *_sizes("depth", "columns", "y_stride", "rank"),
        ("parts", c_int64),
        ("ranks", c_int64 * PARTS),
        ("outputs", c_int64 * PARTS),
        ("scalings", c_float * PARTS),
        *_pointers("quantised"),
    )

    @property
    def adapter_size(self) -> int:
        """How many numbers its adapters have."""
        return sum(self.ranks[i] * (self.depth + self.outputs[i]) for i in range(self.parts))


class Heads(ctypes.Structure):
    """A tensor of heads, with the strides of heads and tokens."""

    _fields_ = (*_pointers("data"), *_sizes("heads", "tokens", "head_stride", "token_stride"))

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        """Shape: (heads, tokens, width), a head's elements next to each other."""
        assert x.stride(-1) == 1
        return cls(x.data_ptr(), *x.shape[:2], *x.stride()[:2])


class CuSeqlensStruct(ctypes.Structure):
    """Which tokens of a packed sequence see which."""

    _fields_ = (*_pointers("key_tokens", "cu_seqlens_q", "cu_seqlens_k"), *_sizes("segments"))


class AttentionArgs(ctypes.Structure):
    """Of `attention` and its backward pass."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "y", "grad_y", "grad_q", "grad_k", "grad_v")),
        *_pointers("lse"),
        *_sizes("head_width"),
        ("seqlens", CuSeqlensStruct),
        ("scale", c_float),
    )


class HeadSoftmaxArgs(ctypes.Structure):
    """Of `head_softmax`."""

    _fields_ = (
        *_pointers("weight", "hidden", "rejected_token", "rejected_node", "row_max", "sum_exp", "mean"),
        *_sizes("vocabulary", "width", "nodes", "rejections"),
        ("scale", c_float),
        *_pointers("quantised"),
    )


class DecoderLayerStruct(ctypes.Structure):
    """The weights of a decoder layer."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        ("norms", c_void_p * 2),
        ("epsilons", c_float * 2),
        ("scale", c_float),
        *_sizes("heads", "key_heads", "head_width"),
    )


class PackedSequenceStruct(ctypes.Structure):
    """A packed sequence's tables of rotation, and which tokens see which."""

    _fields_ = (*_pointers("cosine", "sine"), *_sizes("tokens"), ("seqlens", CuSeqlensStruct))


class SavedActivationsStruct(ctypes.Structure):
    """What a decoder layer's backward pass needs of its forward pass."""

    _fields_ = (
        *_pointers("x", "qkv", "attended", "middle", "gate_up"),
        ("lora_hidden", c_void_p * 4),
        *_pointers("lse"),
    )


class RowLinear(ctypes.Structure):
    """A linear layer for few rows."""

    _fields_ = (
        *_pointers("weight", "bias", "a", "b"),
        *_sizes("depth", "columns", "rank", "first", "ranks"),
        *_pointers("quantised"),
    )


class CachedLayer(ctypes.Structure):
    """A decoder layer whose keys and values are cached."""

    _fields_ = (
        *((name, RowLinear) for name in ("q", "k", "v", "output", "gate", "up", "down")),
        ("norms", c_void_p * 2),
        ("head_norms", c_void_p * 2),
        ("epsilons", c_float * 2),
        ("scale", c_float),
    )


class DecodeArgs(ctypes.Structure):
    """Of `decode`."""

    _fields_ = (
        *_pointers("layers"),
        *_sizes("count", "heads", "key_heads", "head_width", "width"),
        ("head", RowLinear),
        *_pointers("norm"),
        ("epsilon", c_float),
        *_pointers("x", "cosine", "sine", "sequence", "position", "blocks"),
        *_sizes("rows", "blocks_per_sequence", "draws"),
        *_pointers("drawn_row", "temperature", "top_p", "uniform", "token", "logprob"),
        *_pointers("qkv", "lora_hidden", "packed", "gates", "logits"),
    )


STRUCTS = (  # those that hold no other one of these, in the order of `struct_sizes` in memory.c
    *(GemmArgs, AttentionArgs, HeadSoftmaxArgs, DecoderLayerStruct),
    *(PackedSequenceStruct, SavedActivationsStruct, CachedLayer, DecodeArgs),
)
SIGNATURES = {
    "gemm": [POINTER(GemmArgs), c_int],
    "lora_linear": [POINTER(Linear), c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "lora_linear_input_gradient": [POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "lora_linear_weight_gradients": [POINTER(Linear), *[c_void_p] * 4, c_int64, c_void_p, c_int],
    "attention": [POINTER(AttentionArgs), c_int],
    "attention_backward": [POINTER(AttentionArgs), c_int],
    "head_softmax": [POINTER(HeadSoftmaxArgs), c_int],
    "decoder_layers": [c_void_p, c_int64, *[c_void_p] * 3, c_int],
    "decoder_layers_backward": [c_void_p, c_int64, *[c_void_p] * 4, c_int, c_void_p, c_int],
    "rms_norm": [*[c_void_p] * 2, c_float, *[c_void_p] * 2, *[c_int64] * 2, *[c_void_p] * 2, c_int],
    "swiglu": [c_void_p, c_int64, c_void_p, *[c_int64] * 2, *[c_void_p] * 2, c_int],
    "rope": [POINTER(Heads), *[c_void_p] * 2, c_int64, c_int, c_int],
    "decode": [POINTER(DecodeArgs), c_int],
    "dequantise": [POINTER(QuantisedRows), *[c_int64] * 2, c_void_p, c_int],
    "limit_memory": [c_int64],
}


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can be used on these tensors: they are for bf16 on a CPU."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors) and library() is not None


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library on torch's threads; tensors are handed over as pointers to their data.

    Raises:
        MemoryError: there is not enough.
    """
    loaded = library()
    assert loaded is not None, "call `available` first"
    converted = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    failures = c_int64.in_dll(loaded, "failed_allocations")
    before = failures.value
    getattr(loaded, name)(*converted, torch.get_num_threads())
    if failures.value != before:
        remedy = "answer with a smaller --context" if name == "decode" else "train with a smaller --micro-batch-tokens"
        raise MemoryError(f"not enough memory for the kernel {name}: {remedy}")


@lru_cache
def library() -> ctypes.CDLL | None:
    """The functions, or None where the kernels are off; see `build.status`."""
    loaded, _ = build.load()
    if loaded is None:
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    sizes = list((c_int64 * (len(STRUCTS) + 1)).in_dll(loaded, "struct_sizes"))
    if sizes != [*map(ctypes.sizeof, STRUCTS), 0]:
        raise ImportError(f"kernels.h and abi.py differ: {sizes} bytes, {[*map(ctypes.sizeof, STRUCTS)]}")
    return loaded


def address(x: Tensor | None) -> int | None:
    """Where a tensor's data begins, for a field of a struct."""
    return None if x is None else x.data_ptr()
