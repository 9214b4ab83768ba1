"""Softmaxes over the vocabulary at a tile's nodes, the model's and the reference's, and the gradient through them.

    states --W--> logits --> sums over the vocabulary --caller--> factors --> W^T (of_pi pi - of_base base)

`OfLogits` has a tile's logits in memory, made by torch, for every head and device; their gradient takes their place.
`InTiles` has only what is summed over them, in a CPU's matrix registers: there a fourth product, of the reference's
softmax with W too, is cheaper than to keep logits and read W once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from buleyean_rl import kernels
from buleyean_rl.complement import Counts
from buleyean_rl.head import OutputHead, dense_gradient, largest_logit, nodes_of_tile, vocabulary_sums

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


class Softmax(Protocol):
    """Tiles one after the other: the sums of each, and then, if it is wanted, the gradient.

    Args:
        nodes: of a tile, at most.
    """

    nodes: int

    def sums(self, states: Sequence[Tensor], counts: Counts) -> Sums:
        """Of the model's states and then the reference's, if any. Shapes: (nodes, width)."""

    def gradient(self, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor, on_rejected: Tensor) -> Tensor:
        """In the model's states.

        That in the logits is of_pi pi - of_base base, and on rejected tokens what is given.

        Args:
            lse: log-sum-exp of z. Shape: (nodes,).
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
    plain = head.bias is None and head.softcap is None
    if plain and hidden.dtype == head.weight.dtype and kernels.has_head_sums(head.weight):
        return InTiles(head)
    return OfLogits(head, hidden, models)


class OfLogits:
    """Logits in one buffer, whose gradient takes their place."""

    def __init__(self, head: OutputHead, hidden: Tensor, models: int) -> None:
        self._head, self.nodes = head, nodes_of_tile(hidden)
        self._buffer = hidden.new_empty(len(head.weight) * models * min(self.nodes, len(hidden)))

    def sums(self, states: Sequence[Tensor], counts: Counts) -> Sums:
        """See `Softmax`."""
        head, nodes = self._head, len(states[0])
        both = torch.cat(list(states))  # one product is faster than two narrow ones
        raw = head.project(both, self._buffer[: len(head.weight) * len(both)].view(len(head.weight), len(both)))
        model, reference = raw[:, :nodes], raw[:, nodes:] if len(states) == 2 else None
        most = largest_logit(head, raw)
        most, base_most = most[:nodes], torch.zeros_like(most[:nodes]) if reference is None else most[nodes:]
        node, rejected = counts.node, (counts.option, counts.node)
        logits = head.finish(model[rejected]).double()
        base_logits = torch.zeros_like(logits) if reference is None else head.finish(reference[rejected]).double()
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
        dense_gradient(head, model, self._reference, lse, base_lse, of_pi, of_base)
        model[self._rejected] = head.unfinish(on_rejected, self._logits).to(model.dtype)
        return (head.transposed @ model).T


class InTiles:
    """In one pass over the vocabulary, of a head without bias and softcap: sums of W's rows, and no logits."""

    nodes = 512  # their sums take 2.4 MB at a width of 576

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def sums(self, states: Sequence[Tensor], counts: Counts) -> Sums:
        """See `Softmax`."""
        head, node = self._head, counts.node
        tokens = head.weight[counts.option].float()
        logits = [head.scale * torch.linalg.vecdot(x[node].float(), tokens).double() for x in states]
        mean = [head.scale / len(head.weight) * (x.float() @ head.rows_sum) for x in states]
        self._offset = mean[-1] - mean[0]
        self._found = kernels.head_sums(head.weight, states, self._offset, head.scale, counts.option, node)
        self._node, self._tokens = node, tokens
        most, totals, difference, _ = self._found
        others, base_others = totals[0].double(), totals[-1].double()
        if len(states) == 2:
            base_most = most + self._offset
            return Sums(logits[0], logits[1], most, base_most, others, base_others, difference.double())
        ones = torch.ones_like(logits[0])
        rest = len(head.weight) - counts.sum_by_node(ones)
        difference = counts.sum_by_node(logits[0]) - len(head.weight) * mean[0].double()
        return Sums(logits[0], 0 * ones, most, torch.zeros_like(most), others, rest, difference)

    def gradient(self, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor, on_rejected: Tensor) -> Tensor:
        """See `Softmax`."""
        most, _, _, rows = self._found
        del self._found  # before the next tile's are made
        a = of_pi * (most - lse).exp()
        if len(rows) == 2:
            b = of_base * (most + self._offset - base_lse).exp()
            gradient = rows[0].mul_(a.unsqueeze(1)).addcmul_(rows[1], (a - b).unsqueeze(1))
        else:
            b = of_base * (-base_lse).exp()
            gradient = rows[0].mul_(a.unsqueeze(1)).addr_(b, self._head.rows_sum, alpha=-1)
            on_rejected = on_rejected + b[self._node]  # the sum of all rows has them
        gradient.index_add_(0, self._node, self._tokens.mul_(on_rejected.to(rows.dtype).unsqueeze(1)))
        return gradient.mul_(self._head.scale)
