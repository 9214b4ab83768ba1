"""Softmaxes over the vocabulary at a tile's nodes, the model's and the reference's, and the gradient through them.

    states --W--> logits --> sums over the vocabulary --caller--> factors --> W^T (of_pi pi - of_base base)

`MaterializedLogits` has a tile's logits in memory, made by torch, for every head and device; their gradient takes
their place.
`StreamingLogits` has only what is summed over them, by a CPU's kernels: there a fourth product, of the reference's
softmax with W too, is cheaper than to keep logits and read W once more. What it makes of the reference does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from buleyean_rl.kernels import matmul
from buleyean_rl.kernels.precision import product
from buleyean_rl.models.output_head import OutputHead, dense_gradient, largest_logit, nodes_of_tile, vocabulary_sums
from buleyean_rl.objectives.complement import Counts

UNLIKELY = -1e30  # a logit whose exponential is nothing


class Sums(NamedTuple):
    """What a loss needs to know of a tile.

    Args:
        logits: of the rejected tokens. Shape: (entries,).
        base_logits: the reference's, 0 without one. Shape: (entries,).
        most: what z is less below. Shape: (nodes,).
        base_most: what z_ref is less. Shape: (nodes,).
        others: sum e^z of the tokens not rejected. Shape: (nodes,).
        base_others: sum e^z_ref of them. Shape: (nodes,).
        difference: sum e^z_ref (z_ref - z) of them. Shape: (nodes,).
    """

    logits: Tensor
    base_logits: Tensor
    most: Tensor
    base_most: Tensor
    others: Tensor
    base_others: Tensor
    difference: Tensor


class ReferenceSoftmax(NamedTuple):
    """A softmax at some nodes, of the tokens that are not rejected there.

    Args:
        lse: log-sum-exp of their logits, in fp64. Shape: (nodes,).
        mean: of W's rows, by the softmax, in fp32. Shape: (nodes, width).
    """

    lse: Tensor
    mean: Tensor


class Softmax(Protocol):
    """Tiles one after the other: the sums of each, and then, if it is wanted, the gradient.

    Args:
        nodes: of a tile, at most.
    """

    nodes: int

    def sums(self, states: Sequence[Tensor], counts: Counts, rest: ReferenceSoftmax | None) -> Sums:
        """Of the model's states and then the reference's, if any. Shapes: (nodes, width).

        What `reference_softmax` said of the reference is `rest`, if it was asked.
        """

    def gradient(self, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor, on_rejected: Tensor) -> Tensor:
        """In the model's states.

        That in the logits is of_pi pi - of_base base, and on rejected tokens what is given.

        Args:
            lse: log-sum-exp of z; in fp64, as all of these. Shape: (nodes,).
            base_lse: of z_ref. Shape: (nodes,).
            of_pi: Shape: (nodes,).
            of_base: Shape: (nodes,).
            on_rejected: Shape: (entries,).

        Returns:
            Shape: (nodes, width).
        """


def softmax_over(head: OutputHead, hidden: Tensor, models: int) -> Softmax:
    """The softmax of a head at tiles of nodes.

    Args:
        head: the output head.
        hidden: states like those that come.
        models: 2 with a reference, or 1.
    """
    return StreamingLogits(head) if goes_in_tiles(head, hidden.dtype) else MaterializedLogits(head, hidden, models)


def goes_in_tiles(head: OutputHead, dtype: torch.dtype) -> bool:
    """Whether the softmax of a head, at states of a type, is `StreamingLogits`."""
    plain = head.bias is None and head.softcap is None
    return plain and dtype == head.weight.dtype and matmul.head_softmax_available(head.weight)


def reference_softmax(head: OutputHead, states: Tensor, counts: Counts) -> ReferenceSoftmax | None:
    """What a loss would find of a reference, if it can be known before: then it takes two of its products.

    Args:
        head: the output head.
        states: the reference's. Shape: (nodes, width).
        counts: rejections at the nodes.
    """
    return _rest_in_tiles(head, states, counts) if goes_in_tiles(head, states.dtype) else None


class MaterializedLogits:
    """Logits in one buffer, whose gradient takes their place."""

    def __init__(self, head: OutputHead, hidden: Tensor, models: int) -> None:
        self._head, self.nodes = head, nodes_of_tile(hidden)
        self._buffer = hidden.new_empty(len(head.weight) * models * min(self.nodes, len(hidden)))

    def sums(self, states: Sequence[Tensor], counts: Counts, rest: ReferenceSoftmax | None) -> Sums:  # noqa: ARG002 - see `reference_softmax`
        """See `Softmax`."""
        head, nodes = self._head, len(states[0])
        both = torch.cat(list(states))  # one product is faster than two narrow ones
        raw = head.project(both, self._buffer[: len(head.weight) * len(both)].view(len(head.weight), len(both)))
        model, reference = raw[:, :nodes], raw[:, nodes:] if len(states) == 2 else None
        most = largest_logit(head, raw)
        most, base_most = most[:nodes], torch.zeros_like(most[:nodes]) if reference is None else most[nodes:]
        node, rejected = counts.node, (counts.option, counts.node)
        logits = head.scale_and_cap(model[rejected]).double()
        base_logits = (
            torch.zeros_like(logits) if reference is None else head.scale_and_cap(reference[rejected]).double()
        )
        apart = reference is not None and head.softcap is None
        if apart:  # the sums are of the others alone: as a difference, little would be lost in much
            model[rejected] = raw[:, nodes:][rejected] = max(UNLIKELY, torch.finfo(raw.dtype).min)
        sums = [x.double() for x in vocabulary_sums(head, model, reference, most, base_most)]
        if not apart:
            mass, base_mass = (logits - most[node]).exp(), (base_logits - base_most[node]).exp()
            of_rejected = (mass, base_mass, base_mass * (base_logits - logits))
            sums = [x - counts.sum_by_node(y) for x, y in zip(sums, of_rejected, strict=True)]
        self._model, self._reference, self._rejected, self._logits = model, reference, rejected, logits
        return Sums(logits, base_logits, most, base_most, *sums)

    def gradient(self, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor, on_rejected: Tensor) -> Tensor:
        """See `Softmax`."""
        head, model = self._head, self._model
        dtype = torch.promote_types(model.dtype, torch.float32)  # that of logits
        of_nodes = (x.to(dtype) for x in (lse, base_lse, of_pi, of_base))
        dense_gradient(head, model, self._reference, *of_nodes)
        model[self._rejected] = head.scale_and_cap_backward(on_rejected, self._logits).to(model.dtype)
        return product(head.transposed, model).T


class StreamingLogits:
    """In one pass over the vocabulary, of a head without bias and softcap: sums of W's rows, and no logits."""

    nodes = 512  # their sums take 2.4 MB at a width of 576

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def sums(self, states: Sequence[Tensor], counts: Counts, rest: ReferenceSoftmax | None) -> Sums:
        """See `Softmax`."""
        head, hidden, node = self._head, states[0], counts.node
        tokens = head.weight[counts.option].float()
        logits = [head.scale * torch.linalg.vecdot(x[node].float(), tokens).double() for x in states]
        moved = -hidden.float()
        if len(states) == 2:
            moved += states[1]
            base = rest or _rest_in_tiles(head, states[1], counts)
        else:
            logits.append(torch.zeros_like(logits[0]))
            base = self._uniform(tokens, counts)
        model = _rest_in_tiles(head, hidden, counts)
        self._model, self._base, self._node, self._tokens = model, base, node, tokens
        most, base_most = (x.lse.nan_to_num(neginf=0.0) for x in (model, base))
        others, base_others = (model.lse - most).exp(), (base.lse - base_most).exp()
        difference = base_others * head.scale * torch.linalg.vecdot(base.mean, moved).double()
        return Sums(logits[0], logits[1], most, base_most, others, base_others, difference)

    def gradient(self, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor, on_rejected: Tensor) -> Tensor:
        """See `Softmax`."""
        model, base = self._model, self._base
        del self._model, self._base  # before the next tile's are made
        a, b = of_pi * (model.lse - lse).exp(), of_base * (base.lse - base_lse).exp()
        gradient = model.mean.mul_(a.float().unsqueeze(1)).addcmul_(base.mean, b.float().unsqueeze(1), value=-1)
        gradient.index_add_(0, self._node, self._tokens.mul_(on_rejected.float().unsqueeze(1)))
        return gradient.mul_(self._head.scale)

    def _uniform(self, tokens: Tensor, counts: Counts) -> ReferenceSoftmax:
        """Where all logits are zero."""
        head = self._head
        others = len(head.weight) - counts.sum_by_node(torch.ones_like(counts.count)).double()
        rows = head.rows_sum.expand(len(others), -1).clone().index_add_(0, counts.node, tokens, alpha=-1)
        return ReferenceSoftmax(others.log(), rows / others.clamp_min(1).float().unsqueeze(1))


def _rest_in_tiles(head: OutputHead, states: Tensor, counts: Counts) -> ReferenceSoftmax:
    most, total, mean = matmul.head_softmax(head.weight, states.contiguous(), head.scale, counts.option, counts.node)
    return ReferenceSoftmax(most.double() + total.double().log(), mean)
