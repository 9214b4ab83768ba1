"""Decoder layers of Llama's form in one call, in bf16; see `decoder_layer.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_void_p
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.abi import DecoderLayerStruct, Linear, PackedSequenceStruct, SavedActivationsStruct, call
from buleyean_rl.kernels.attention import CuSeqlens

PADDING = 32  # numbers after a row of qkv and gate_up: rows a power of two apart drive each other from a cache


class SavedActivations(NamedTuple):
    """What a layer's backward pass needs of its forward pass.

    Args:
        x: its input. Shape: (tokens, width).
        qkv: queries, keys and values, rotated, and `PADDING`. Shape: (tokens, width of all heads).
        attended: attention's result. Shape: (tokens, width of all queries' heads).
        middle: the residual stream between attention and MLP. Shape: (tokens, width).
        gate_up: gates and what they let through, and `PADDING`. Shape: (tokens, 2 * hidden width).
        lse: log-sum-exps of the scores, in fp32. Shape: (heads, tokens).
        lora_hidden: what the A's of the four linear layers made of their inputs. Shapes: (tokens, rank).
    """

    x: Tensor
    qkv: Tensor
    attended: Tensor
    middle: Tensor
    gate_up: Tensor
    lse: Tensor
    lora_hidden: tuple[Any, ...]


class DecoderLayer(NamedTuple):
    """The weights of a layer.

    Args:
        linears: see `matmul.make_linear`. Queries, keys and values side by side; the output of attention; gate and up
            side by side; down.
        norms: weights of the first and the second. Shapes: (width,).
        epsilons: theirs.
        heads: how many queries have, and keys.
        scale: factor on the scores.
    """

    linears: Sequence[Linear]
    norms: Sequence[Tensor]
    epsilons: Sequence[float]
    heads: tuple[int, int]
    scale: float

    @property
    def sizes(self) -> tuple[object, ...]:
        """What layers in one call have in common."""
        return self.heads, *((linear.depth, linear.columns, linear.rank) for linear in self.linears)

    def as_struct(self, head_width: int) -> DecoderLayerStruct:
        """As `kernels.h` has it; this has to outlive it."""
        norms = tuple(norm.data_ptr() for norm in self.norms)
        layer = DecoderLayerStruct(*self.linears, norms, tuple(self.epsilons), self.scale, *self.heads, head_width)
        for linear in (layer.qkv, layer.gate_up):
            linear.y_stride += PADDING
        return layer


class DecoderLayers:
    """Layers one after the other, and the packed sequence that goes through them.

    Args:
        layers: all of the same sizes.
        cos: contiguous. Shape: (tokens, head width).
        sin: contiguous. Shape: (tokens, head width).
        seqlens: of the sequence.
    """

    def __init__(self, layers: Sequence[DecoderLayer], cos: Tensor, sin: Tensor, seqlens: CuSeqlens) -> None:
        self._layers = layers
        self._tensors = cos, sin, seqlens  # which C has pointers to
        structs = (DecoderLayerStruct * len(layers))(*(layer.as_struct(cos.shape[-1]) for layer in layers))
        sequence = PackedSequenceStruct(cos.data_ptr(), sin.data_ptr(), len(cos), seqlens.as_struct())
        self._arguments = structs, len(layers), byref(sequence)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[SavedActivations]]:
        """The last one's result, and what `backward` needs of each, if it is to be kept.

        Args:
            x: contiguous. Shape: (tokens, width), as the result.
            keep: whether it is; otherwise the layers share the memory for it.
        """
        y, after_first = torch.empty_like(x), len(self._layers) - 1
        inputs = [x, *(torch.empty_like(x) for _ in range(after_first if keep else min(after_first, 2)))]
        buffers = [self._allocate(x) for _ in range(after_first + 1 if keep else 1)]
        each_input = [x, *islice(cycle(inputs[1:]), after_first)]
        saved = [buffer._replace(x=own) for own, buffer in zip(each_input, cycle(buffers), strict=False)]
        call("decoder_layers", *self._arguments, _as_structs(saved), y)
        return y, saved

    def backward(
        self, grad_y: Tensor, saved: Sequence[SavedActivations], needs_grad_x: bool, grads: Sequence[Tensor]
    ) -> Tensor | None:
        """The gradient in the first one's input, if it is needed, from that in the last one's result.

        Those in the adapters of each linear layer of each layer are added to `grads`, see
        `matmul.lora_linear_backward`.
        """
        grad_x = torch.empty_like(grad_y)
        pointers = (c_void_p * len(grads))(*(grad.data_ptr() for grad in grads))
        arguments = (*self._arguments, _as_structs(saved), grad_y, grad_x, needs_grad_x, pointers)
        call("decoder_layers_backward", *arguments)
        return grad_x if needs_grad_x else None

    def _allocate(self, x: Tensor) -> SavedActivations:
        """Memory for what is saved of one layer."""
        layer, tokens = self._layers[0], len(x)
        qkv, output, gate_up, _ = layer.linears
        widths = (qkv.columns + PADDING, output.depth, x.shape[1], gate_up.columns + PADDING)
        projected, attended, middle, gates = (x.new_empty(tokens, width) for width in widths)
        lse = x.new_empty(layer.heads[0], tokens, dtype=torch.float32)
        lora_hidden = tuple(x.new_empty(tokens, linear.rank) for linear in layer.linears)
        return SavedActivations(x, projected, attended, middle, gates, lse, lora_hidden)


def _as_structs(saved: Sequence[SavedActivations]) -> ctypes.Array[SavedActivationsStruct]:
    structs = (
        SavedActivationsStruct(
            *(x.data_ptr() for x in layer[:5]), tuple(x.data_ptr() for x in layer.lora_hidden), layer.lse.data_ptr()
        )
        for layer in saved
    )
    return (SavedActivationsStruct * len(saved))(*structs)
