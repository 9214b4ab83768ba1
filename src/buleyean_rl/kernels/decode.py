"""Rows of many sequences through all decoder layers and the output head, in one call, in bf16; see `decode.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from buleyean_rl.kernels.abi import BLOCK, CachedLayer, DecodeArgs, RowLinear, address, call
from buleyean_rl.kernels.quantised import quantised_address

CACHE_BLOCK = 16  # tokens
RANK_BLOCK = 8  # ADAPTER_COLUMNS in `decode.c`


class LinearWeights(NamedTuple):
    """A linear layer and its adapter, all contiguous and in bf16; see `RowLinear` in `kernels.h`.

    Args:
        weight: contiguous, or quantised. Shape: (outputs, inputs).
        bias: Shape: (outputs,), or None.
        a: of all layers that share the input. Shape: (ranks, inputs), or None.
        b: scaled, by blocks of outputs. Shape: (outputs / 32, rank / 2, 32, 2), or None.
        first: of the rows of `a`, where this layer's begin.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    first: int = 0

    def as_struct(self) -> RowLinear:
        """As `kernels.h` has it; this has to outlive it."""
        pointers = map(address, (self.weight, self.bias, self.a, self.b))
        columns, depth = self.weight.shape
        rank, ranks = 0 if self.b is None else 2 * self.b.shape[1], 0 if self.a is None else len(self.a)
        return RowLinear(*pointers, depth, columns, rank, self.first, ranks, quantised_address(self.weight))


def share_input(
    linears: Sequence[LinearWeights], adapters: Sequence[tuple[Tensor, Tensor] | None]
) -> list[LinearWeights]:
    """Linear layers with one input, and their adapters.

    Args:
        linears: without adapters.
        adapters: A and B, scaled, of each that has one. Shapes: (rank, inputs), (outputs, rank).
    """
    filled = [None if pair is None else _fill_rank(*pair) for pair in adapters]
    if not any(filled):
        return list(linears)
    a = torch.cat([pair[0] for pair in filled if pair])
    firsts = accumulate((len(pair[0]) if pair else 0 for pair in filled), initial=0)
    return [
        linear._replace(a=a, b=pair and _as_words(pair[1]), first=first)
        for linear, pair, first in zip(linears, filled, firsts, strict=False)
    ]


def _fill_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros, up to a multiple of what is computed at once."""
    missing = -len(a) % RANK_BLOCK
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))


def _as_words(b: Tensor) -> Tensor:
    outputs, rank = b.shape
    return b.view(outputs // BLOCK, BLOCK, rank // 2, 2).transpose(1, 2).contiguous()


class LayerWeights(NamedTuple):
    """A decoder layer.

    Args:
        linears: queries, keys, values, output, gate, up, down.
        norms: weights of the first and the second RMSNorm. Shapes: (width,).
        head_norms: of queries and keys. Shapes: (head width,), or None.
        epsilons: of the first and the second.
        scale: factor on the scores.
    """

    linears: Sequence[LinearWeights]
    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor | None, Tensor | None]
    epsilons: tuple[float, float]
    scale: float

    def as_struct(self) -> CachedLayer:
        """As `kernels.h` has it; this has to outlive it."""
        norms, head_norms = (tuple(map(address, pair)) for pair in (self.norms, self.head_norms))
        return CachedLayer(*(each.as_struct() for each in self.linears), norms, head_norms, self.epsilons, self.scale)


class DecoderWeights(NamedTuple):
    """A whole model but for its embedding.

    Args:
        layers: all of the same sizes.
        head_width: of a query, a key and a value.
        norm: weight of the last RMSNorm. Shape: (width,).
        epsilon: its.
        head: the output head. Shape: (vocabulary, width).
    """

    layers: Sequence[LayerWeights]
    head_width: int
    norm: Tensor
    epsilon: float
    head: Tensor


class Rows(NamedTuple):
    """The tokens of a step, each of a sequence and at a position in it.

    Args:
        x: their embeddings, contiguous; overwritten. Shape: (rows, width).
        cosine: of the rotations. Shape: (rows, head width).
        sine: Shape: (rows, head width).
        sequence: row of `blocks`. Shape: (rows,).
        position: number of tokens before. Shape: (rows,).
        blocks: addresses of each sequence's blocks. Shape: (sequences, blocks).
    """

    x: Tensor
    cosine: Tensor
    sine: Tensor
    sequence: Tensor
    position: Tensor
    blocks: Tensor


class Draws(NamedTuple):
    """After which rows tokens are drawn, and how.

    Args:
        rows: Shape: (draws,).
        temperature: 0 is greedy. Shape: (draws,).
        top_p: probability of the nucleus, before the temperature. Shape: (draws,).
        uniform: numbers between 0 and 1 that decide. Shape: (draws,).
    """

    rows: Tensor
    temperature: Tensor
    top_p: Tensor
    uniform: Tensor


class Decoder:
    """Decoder layers and an output head.

    Args:
        weights: all of the model's.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights  # which C has pointers to
        layers, head_width = weights.layers, weights.head_width
        self._structs = (CachedLayer * len(layers))(*(layer.as_struct() for layer in layers))
        queries, keys, *_, down = (linear.weight.shape for linear in layers[0].linears)
        self.head_width = head_width
        self.heads, self.key_heads = queries[0] // head_width, keys[0] // head_width
        ranks = max(
            struct.ranks for layer in self._structs for struct in (layer.q, layer.output, layer.gate, layer.down)
        )
        qkv, gates = queries[0] + 2 * keys[0], down[1]
        self._widths = (qkv, ranks or 1, max(queries), gates)  # no memory would be NULL
        self._row_memory: list[Tensor] = []
        self.logits = torch.empty(0, len(weights.head))  # of the last draws, and memory for more
        self.block_numbers = len(layers) * 2 * keys[0] * CACHE_BLOCK  # of a block of the cache

    def step(self, rows: Rows, draws: Draws) -> tuple[Tensor, Tensor]:
        """Compute rows, whose keys and values come into their sequences' blocks, and draw tokens after some of them.

        Returns:
            The tokens and their log-probabilities at temperature 1. Shapes: (draws,).
        """
        weights, count = self._weights, len(draws.rows)
        self._allocate(max(len(rows.x), count), count)
        tokens, logprobs = torch.empty(count, dtype=torch.long), torch.empty(count)
        arguments = DecodeArgs(
            *(
                ctypes.addressof(self._structs),
                len(weights.layers),
                self.heads,
                self.key_heads,
                weights.head_width,
                rows.x.shape[1],
            ),
            *(LinearWeights(weights.head).as_struct(), weights.norm.data_ptr(), weights.epsilon),
            *map(address, rows),
            *(len(rows.x), rows.blocks.shape[1], count),
            *map(address, (*draws, tokens, logprobs)),
            *map(address, (*self._row_memory, self.logits)),
        )
        call("decode", byref(arguments))
        return tokens, logprobs

    def _allocate(self, rows: int, draws: int) -> None:
        """Memory to work in, kept from step to step."""
        if not self._row_memory or len(self._row_memory[0]) < rows:
            dtypes = [torch.bfloat16] * 2 + [torch.float32] * 2
            memory = zip(self._widths, dtypes, strict=True)
            self._row_memory = [torch.empty(rows, width, dtype=dtype) for width, dtype in memory]
        if len(self.logits) < draws:
            self.logits = torch.empty(draws, self.logits.shape[1])
