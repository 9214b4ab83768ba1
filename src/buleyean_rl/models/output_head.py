"""The output head, and reductions over the logits of a tile: as many nodes as fit in a cache.

A tile has the vocabulary as its first dimension, so W is the left operand of both products with it, the one that a
CPU's matrix kernels read without packing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from buleyean_rl.kernels import abi, elementwise, matmul
from buleyean_rl.kernels.precision import bf16_is_emulated, product
from buleyean_rl.kernels.quantised import QuantisedTensor

# Nodes of a tile: enough for efficient products, and with V = 49,152 in bf16 it holds 6 MB. A GPU has memory to spare.
TILE = 64
GPU_FACTOR = 32
CHUNK = 1 << 16  # logits that torch reduces at a time: they stay in a CPU's cache


@dataclass(frozen=True)
class OutputHead:
    """The frozen map from hidden states to logits: softcap * tanh(scale * (W h + bias) / softcap).

    Args:
        weight: W. Shape: (vocabulary, width).
        bias: Shape: (vocabulary,), or None.
        scale: factor on the logits, above 0 (Cohere, Granite).
        softcap: bound on the logits (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` (nodes, width), in at least fp32. Shape: (nodes, vocabulary)."""
        return self.scale_and_cap(self.project(hidden)).T

    @cached_property
    def _in_c(self) -> abi.Linear | None:
        """W as the kernels take it, if it is quantised and they can."""
        is_quantised = isinstance(self.weight, QuantisedTensor)
        readable = is_quantised and matmul.gemm_available(self.weight, self.weight.T)
        return matmul.make_linear(self.weight) if readable else None

    @cached_property
    def _transposed(self) -> Tensor:
        """W^T. Shape: (width, vocabulary). Copied in bf16 on a CPU, where W itself makes slower products."""
        if isinstance(self.weight, QuantisedTensor):
            return self.weight.T
        in_bf16_on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16
        return self.weight.T.contiguous() if in_bf16_on_cpu and not bf16_is_emulated(self.weight) else self.weight.T

    @cached_property
    def rows_sum(self) -> Tensor:
        """The sum of W's rows, in fp32. Shape: (width,)."""
        return self.weight.sum(0, dtype=torch.float32)

    def project(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """W h + bias, in the weight's type. Shape: (nodes, width) to (vocabulary, nodes)."""
        if self._in_c is not None:
            raw = matmul.lora_linear(hidden.contiguous(), self._in_c)[0].T
            raw = raw if out is None else out.copy_(raw)
        elif out is None and bf16_is_emulated(self.weight) and matmul.gemm_available(self.weight):
            padded = torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % abi.BLOCK)).contiguous()
            raw = matmul.lora_linear(self.weight, matmul.make_linear(padded))[0][:, : len(hidden)].contiguous()
        else:
            raw = product(self.weight, hidden.T.contiguous(), out)
        return raw if self.bias is None else raw.add_(self.bias.unsqueeze(1))

    def project_backward(self, gradient: Tensor) -> Tensor:
        """The gradient in the states from that in what `project` made. Shape: (vocabulary, nodes) to (nodes, width)."""
        if self._in_c is not None:
            return matmul.linear_input_gradient(gradient.T.contiguous(), self._in_c)
        return product(self._transposed, gradient).T

    def scale_and_cap(self, raw: Tensor) -> Tensor:
        """Logits from what `project` made, in at least fp32. Shape: any."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def scale_and_cap_backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in what `project` made, from the gradient in the logits. Shape: any."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient


def nodes_of_tile(hidden: Tensor) -> int:
    """How many nodes' logits fit in a tile, of states like `hidden`."""
    return TILE * (GPU_FACTOR if hidden.is_cuda else 1)


def node_tiles(hidden: Tensor, size: int | None = None) -> list[slice]:
    """Nodes to be worked on together, `size` or what fits in a tile; hidden is (nodes, width)."""
    return _slices(len(hidden), size or nodes_of_tile(hidden))


def largest_logit(head: OutputHead, raw: Tensor) -> Tensor:
    """Of each node, from what `project` made. Shape: (vocabulary, nodes) to (nodes,)."""
    passes = elementwise.loss_passes(raw)
    return head.scale_and_cap(raw.amax(0) if passes is None else passes.row_max(raw))


def vocabulary_sums(
    head: OutputHead, raw: Tensor, raw_reference: Tensor | None, row_max: Tensor, reference_row_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the vocabulary, for each node: sum e^z, sum e^z_ref and sum e^z_ref (z_ref - z), less `row_max`.

    Args:
        head: the output head.
        raw: what its `project` made of the model's states. Shape: (vocabulary, nodes).
        raw_reference: the same of the reference's, with the strides of `raw`; None for logits of zero.
        row_max: the `largest_logit` of `raw`. Shape: (nodes,).
        reference_row_max: that of `raw_reference`, or zero.

    Returns:
        Three tensors of shape (nodes,).
    """
    passes = elementwise.loss_passes(raw)
    if head.softcap is None and passes is not None:
        return passes.softmax_sums(raw, raw_reference, head.scale, row_max, reference_row_max)
    sums = torch.zeros(3, *row_max.shape, dtype=row_max.dtype, device=row_max.device)
    for chunk in _chunks(raw):
        logits = head.scale_and_cap(raw[chunk])
        reference = None if raw_reference is None else head.scale_and_cap(raw_reference[chunk])
        sums[0] += (logits - row_max).exp_().sum(0)
        mass = torch.ones_like(logits) if reference is None else (reference - reference_row_max).exp_()
        sums[1] += mass.sum(0)
        sums[2] += torch.linalg.vecdot(mass, -logits if reference is None else reference - logits, dim=0)
    sum_exp, reference_sum_exp, difference = sums
    return sum_exp, reference_sum_exp, difference


def dense_gradient(
    head: OutputHead,
    raw: Tensor,
    raw_reference: Tensor | None,
    lse: Tensor,
    reference_lse: Tensor,
    pi_weight: Tensor,
    reference_weight: Tensor,
) -> None:
    """pi_weight * pi - reference_weight * reference, as a gradient in what `project` made, written over `raw`.

    Args:
        head: the output head.
        raw: see `vocabulary_sums`.
        raw_reference: see `vocabulary_sums`.
        lse: log-sum-exp of the nodes. Shape: (nodes,).
        reference_lse: the same of the reference. Shape: (nodes,).
        pi_weight: Shape: (nodes,).
        reference_weight: Shape: (nodes,).
    """
    passes = elementwise.loss_passes(raw)
    if head.softcap is None and passes is not None:
        passes.softmax_gradient(raw, raw_reference, head.scale, lse, reference_lse, pi_weight, reference_weight)
        return
    for chunk in _chunks(raw):
        logits = head.scale_and_cap(raw[chunk])
        reference = 0.0 if raw_reference is None else head.scale_and_cap(raw_reference[chunk])
        log_reference = reference - reference_lse
        gradient = (logits - lse).exp_().mul_(pi_weight) - log_reference.exp_().mul_(reference_weight)
        raw[chunk] = head.scale_and_cap_backward(gradient, logits)


def _chunks(raw: Tensor) -> list[slice]:
    """Rows of a tile to be worked on together."""
    vocabulary, nodes = raw.shape
    return _slices(vocabulary, vocabulary if raw.is_cuda else CHUNK // max(nodes, 1))


def _slices(length: int, size: int) -> list[slice]:
    """Consecutive slices of at least one; a single empty one where there is nothing."""
    starts = range(0, length, max(size, 1)) or [0]
    return [slice(start, min(start + max(size, 1), length)) for start in starts]
