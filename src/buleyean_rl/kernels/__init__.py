"""What torch does in too many sweeps, in C for a CPU.

    *.c --`build`, once--> a library a type --ctypes--> functions of tensors

The element-wise passes of `kernels.c` are for bf16 and fp32; products, the loss and attention are for bf16. They go
block by block, in a processor's matrix registers (AMX) or in its vectors (`tiles.h`). Where there is no compiler
`available()` is False, and the callers do the same work in torch, in more sweeps. On CUDA the passes of the loss are in
`triton.py`.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.arithmetic import is_slow
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


class Adapter(NamedTuple):
    """Adapters of layers side by side: their a's on top of each other, their b's along a diagonal.

    Args:
        a: contiguous. Shape: (rank, inputs).
        b: contiguous, scaled. Shape: (outputs, rank).
        ranks: of each layer.
        outputs: of each layer.
        scalings: of each layer, which are in `b`.
    """

    a: Tensor
    b: Tensor
    ranks: Sequence[int]
    outputs: Sequence[int]
    scalings: Sequence[float]


class Heads(ctypes.Structure):
    """Of `passes.h`."""

    _fields_ = (("at", c_void_p), *((name, c_int64) for name in ("heads", "tokens", "head", "token")))

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        """A (heads, tokens, width)."""
        assert x.stride(-1) == 1
        return cls(x.data_ptr(), *x.shape[:2], *x.stride()[:2])


class _Stretches(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("places", "until_query", "until_key")),
        *((name, c_int64) for name in ("count", "most_queries")),
    )


ATTENDING = [c_int64, _Stretches, c_float]
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


def loss_passes(tile: Tensor) -> ModuleType | None:
    """The module whose `column_most`, `softmax_sums` and `softmax_gradient` take a tile of logits; None for torch."""
    if tile.is_cuda and tile.dtype in (*build.SOURCES, torch.float16):
        return _triton()
    return sys.modules[__name__] if available(tile) else None


def column_most(x: Tensor) -> Tensor:
    """The largest value of each column. Shape: (rows, columns) to (columns,), in fp32."""
    threads = torch.get_num_threads()
    most = torch.empty(threads, x.shape[1])
    _call("column_most", x, *x.shape, most, threads)
    return most.amax(0)


def softmax_sums(
    z: Tensor, z_ref: Tensor | None, scale: float, most: Tensor, base_most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the rows, for each column: sum e^z, sum e^z_ref and sum e^z_ref (z_ref - z), exponents less the most.

    Args:
        z: Shape: (vocabulary, nodes), a node's logits less `scale` in a column; columns next to each other.
        z_ref: the reference's, with the stride of `z`, or None for zeros.
        scale: factor on the logits.
        most: subtracted from z before its exponential. Shape: (nodes,).
        base_most: the same for z_ref. Shape: (nodes,).

    Returns:
        Three tensors of shape (nodes,).
    """
    rows, nodes = z.shape
    threads = torch.get_num_threads()
    sums = torch.empty(threads, 3, nodes)
    _call("softmax_sums", z, z_ref, rows, nodes, z.stride(0), scale, most, base_most, sums, threads)
    total, base_total, difference = sums.sum(0)
    return total, base_total, difference


def softmax_gradient(
    z: Tensor, z_ref: Tensor | None, scale: float, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor
) -> None:
    """scale * (of_pi * softmax(z) - of_base * softmax(z_ref)), written over `z`.

    Args:
        z: see `softmax_sums`.
        z_ref: see `softmax_sums`.
        scale: factor on the logits.
        lse: log-sum-exp of the columns. Shape: (nodes,).
        base_lse: the same of the reference. Shape: (nodes,).
        of_pi: Shape: (nodes,).
        of_base: Shape: (nodes,).
    """
    rows, nodes = z.shape
    threads = torch.get_num_threads()
    _call("softmax_gradient", z, z_ref, rows, nodes, z.stride(0), scale, lse, base_lse, of_pi, of_base, threads)


def causal_softmax(scores: Tensor) -> None:
    """Attention weights, written over the scores of queries that are the last of the keys' positions.

    Args:
        scores: contiguous. Shape: (key heads, queries, heads per key head, keys).
    """
    _call("causal_softmax", scores, *scores.shape, torch.get_num_threads())


def softmax_backward(gradient: Tensor, weights: Tensor) -> None:
    """The gradient in the scores of a softmax, written over that in its weights.

    Args:
        gradient: contiguous. Shape: (..., keys).
        weights: contiguous. Shape as `gradient`.
    """
    keys = gradient.shape[-1]
    _call("softmax_backward", gradient, weights, gradient.numel() // keys, keys, torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / rms(x).

    Args:
        x: contiguous. Shape: (..., width).
        weight: Shape: (width,).
        epsilon: added to the mean square.
    """
    width, y = x.shape[-1], torch.empty_like(x)
    _call("rms_norm", x, weight, x.numel() // width, width, epsilon, y, torch.get_num_threads())
    return y


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None
) -> Tensor:
    """The gradient in `x` from that in the result of `rms_norm`, with something added. Shapes as there, contiguous."""
    width, grad_x = x.shape[-1], torch.empty_like(x)
    sizes = (x.numel() // width, width, epsilon)
    _call("rms_norm_backward", gradient, x, weight, added, *sizes, grad_x, None, torch.get_num_threads())
    return grad_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. Shape: (..., 2 * width), a gate and then what it lets through, contiguous; to (..., width)."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    _call("swiglu", gate_up, 2 * width, y.numel() // width, width, y, torch.get_num_threads())
    return y


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in `gate_up` from that in the result of `swiglu`. Shapes as there, contiguous."""
    width, grad = gradient.shape[-1], torch.empty_like(gate_up)
    sizes = (2 * width, gradient.numel() // width, width)
    _call("swiglu_backward", gradient, gate_up, *sizes, grad, None, torch.get_num_threads())
    return grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> None:
    """Rotary embedding of one sequence: x cos + (-x2, x1) sin, where x1 and x2 are the halves of a head.

    Args:
        x: each head's elements next to each other. Shape: (heads, tokens, width).
        cos: contiguous. Shape: (tokens, width).
        sin: contiguous. Shape: (tokens, width).
        y: filled with the result. Shape as `x`, strides as they may be; it may be `x`.
        backward: whether `x` is the gradient in the result, and `y` that in what was rotated.
    """
    strides_x, strides_y = x.stride()[:2], y.stride()[:2]
    _call("rotate", x, *strides_x, cos, sin, *x.shape, backward, y, *strides_y, torch.get_num_threads())


def dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """x / (1 - p) on elements kept at random, and 0 elsewhere; the same seed keeps the same ones.

    Args:
        x: contiguous. Shape: any.
        p: share dropped.
        seed: below 2^32.
        add_to: added to, if given, and returned. Shape as `x`.
    """
    y = torch.empty_like(x) if add_to is None else add_to
    _call("dropout", x, x.numel(), p, seed, add_to is not None, y, torch.get_num_threads())
    return y


def multiplies(*matrices: Tensor) -> bool:
    """Whether `adapted` can be used with these matrices, and is quick on `least_rows` or more."""
    fit = all(x.dtype == torch.bfloat16 and not x.shape[-1] % STEP for x in matrices)
    return fit and available(*matrices) and _has_tiles()


def least_rows(x: Tensor) -> int:
    """How many rows `adapted` and `attention` are to be given, of a type, for torch not to be quicker."""
    return 1 if is_slow(x) else STEP


def depth_of(size: int, x: Tensor) -> int:
    """What a matrix that multiplies ones like `x` is to be filled up to, with zeros."""
    return _filled(size) if x.dtype == torch.bfloat16 and available(x) and _has_tiles() else size


def linear_of(weight: Tensor, adapter: Adapter | None = None) -> Linear:
    """A linear layer and its adapter for `adapted`, where `multiplies` says so; they have to outlive it.

    Args:
        weight: contiguous. Shape: (outputs, inputs).
        adapter: of one to three layers side by side.
    """
    columns, depth = weight.shape
    if adapter is None:
        return Linear(weight.data_ptr(), depth=depth, columns=columns, apart=columns)
    a, b, *parts = adapter
    places = (x.data_ptr() for x in (weight, a, b))
    return Linear(*places, depth, columns, columns, len(a), 0.0, 0, len(adapter.ranks), *map(tuple, parts))


def copy_adapters(linears: Sequence[tuple[Linear, Sequence[Tensor]]]) -> None:
    """Let the a's and b's of linear layers be the A's and B's that go with them, the latter scaled.

    Args:
        linears: see `linear_of`; A and B of each of its parts, in fp32 and contiguous.
    """
    places = [parameter.data_ptr() for _, parameters in linears for parameter in parameters]
    of_each = (ctypes.POINTER(Linear) * len(linears))(*(ctypes.pointer(linear) for linear, _ in linears))
    given = of_each, len(linears), (c_void_p * len(places))(*places), torch.get_num_threads()
    _call_in(torch.bfloat16, "copy_adapters", *given)


def adapted(x: Tensor, linear: Linear, added: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x weight^T + low b^T + added, where low = dropout(x) a^T, in bf16.

    Args:
        x: contiguous. Shape: (rows, inputs).
        linear: see `linear_of`.
        added: contiguous. Shape: (rows, outputs).

    Returns:
        The result and, with an adapter, `low`. Shapes: (rows, outputs), (rows, rank).
    """
    y = x.new_empty(len(x), linear.columns)
    low = x.new_empty(len(x), linear.rank) if linear.a else None
    _call_in(torch.bfloat16, "adapted", linear, x, added, len(x), low, y, torch.get_num_threads())
    return y, low


def adapted_backward(
    gradient: Tensor, x: Tensor, linear: Linear, low: Tensor, of_x: bool, grads: Tensor
) -> Tensor | None:
    """The gradient of `adapted` in `x`, if it is wanted, from that in its result; those in its adapters are added.

    Args:
        gradient: contiguous. Shape: (rows, outputs).
        x: contiguous. Shape: (rows, inputs).
        linear: see `linear_of`.
        low: what `adapted` gave. Shape: (rows, rank).
        of_x: whether the gradient in `x` is wanted.
        grads: those in each part's A, (rank, inputs), and B, (outputs, rank), one after the other, its scaling's factor
            in the latter; in fp32, added to. Shape: (`linear.learning`,).
    """
    grad_x = torch.empty_like(x) if of_x else None
    _call_in(
        torch.bfloat16, "adapted_backward", linear, gradient, x, low, len(x), grad_x, grads, torch.get_num_threads()
    )
    return grad_x


def has_head_sums(weight: Tensor) -> bool:
    """Whether `head_sums` can be used with an output head, and is quick. Shape: (vocabulary, width).

    It takes a product more than logits do, which has to be cheaper than torch's.
    """
    return not weight.shape[0] % STEP and multiplies(weight) and (is_slow(weight) or _has_matrix_registers())


def head_sums(
    weight: Tensor, hidden: Tensor, scale: float, tokens: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a softmax over the vocabulary, what its normaliser and its gradient are made of, in bf16, in one pass.

    Args:
        weight: W of the output head, contiguous. Shape: (vocabulary, width).
        hidden: contiguous. Shape: (nodes, width).
        scale: factor on the logits.
        tokens: that do not count. Shape: (entries,).
        nodes: at which they do not, sorted. Shape: (entries,).

    Returns:
        In fp32: one of each node's largest logits; sum e^z, exponents less that; the mean of W's rows by e^z. Shapes:
        (nodes,), (nodes,), (nodes, width).
    """
    most, total, mean = torch.empty(len(hidden)), torch.empty(len(hidden)), torch.empty(hidden.shape)
    rejected = (tokens, nodes, len(tokens))
    threads = torch.get_num_threads()
    _call("head_sums", weight, *weight.shape, hidden, len(hidden), scale, *rejected, most, total, mean, threads)
    return most, total, mean


class Stretches(NamedTuple):
    """Which tokens of a packed row see which: the queries of a stretch are the last of the keys they see.

    Args:
        keys: places in the row that each stretch sees, one stretch after the other; None for the row as it is.
        until_query: where each stretch's queries end, and 0 before, in int32. Shape: (stretches + 1,).
        until_key: the same of `keys`.
        most_queries: of a stretch.
        most_keys: of a stretch.
    """

    keys: Tensor | None
    until_query: Tensor
    until_key: Tensor
    most_queries: int
    most_keys: int

    def in_c(self) -> ctypes.Structure:
        """As `attention.c` takes it; this has to outlive it."""
        pointers = (None if x is None else x.data_ptr() for x in self[:3])
        return _Stretches(*pointers, len(self.until_query) - 1, self.most_queries)


def attends(like: Tensor, tokens: int, width: int) -> bool:
    """Whether `attention` can be used on heads of some width, in numbers like these, and is quick: on enough tokens."""
    fits = like.dtype == torch.bfloat16 and width % STEP == 0 and tokens >= least_rows(like)
    return fits and available(like) and _has_tiles()


def attention(query: Tensor, key: Tensor, value: Tensor, stretches: Stretches, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a packed row, in bf16.

    Args:
        query: a head's elements next to each other, a multiple of 32. Shape: (heads, tokens, width).
        key: alike. Shape: (key heads, tokens, width).
        value: Shape as `key`.
        stretches: of the row.
        scale: factor on the scores.

    Returns:
        Shape: (tokens, heads, width). And log-sum-exps of the scores, in fp32. Shape: (heads, tokens).
    """
    heads, tokens, width = query.shape
    y, lse = query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)
    rows = (Heads.of(x) for x in (query, key, value, y.transpose(0, 1)))
    _call_in(torch.bfloat16, "attention", *rows, lse, width, stretches.in_c(), scale, torch.get_num_threads())
    return y, lse


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    stretches: Stretches,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """The gradients of `attention` in queries, keys and values, from that in its result `y`. Shapes as there.

    Filled with them are the last three, whose strides may be any that those of queries may.
    """
    inputs = (Heads.of(x) for x in (query, key, value, y.transpose(0, 1)))
    given = (lse, Heads.of(gradient.transpose(0, 1)), key.shape[-1], stretches.in_c(), scale)
    grads = (Heads.of(x) for x in (grad_query, grad_key, grad_value))
    _call_in(torch.bfloat16, "attention_backward", *inputs, *given, *grads, torch.get_num_threads())


def _filled(size: int) -> int:
    return math.ceil(size / STEP) * STEP


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
def _triton() -> ModuleType | None:
    """Comes with a torch for CUDA."""
    try:
        from buleyean_rl.kernels import triton
    except ImportError:
        return None
    return triton


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
