"""Softmaxes over the vocabulary at a tile's nodes, the model's and the reference's, and the gradient through them.

    states --W--> logits --> sums over the vocabulary --caller--> coefficients --> W^T (gradient in the logits)

`StreamingLogits` has only sums over them, by a CPU's kernels, wherever there are any and the head has neither bias nor
softcap. What it computes of the reference does not change, and may be cached.
`MaterializedLogits` has a tile's logits in memory, made by torch, for every head and device; their gradient takes
their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from buleyean_rl.kernels import matmul
from buleyean_rl.models.output_head import OutputHead, dense_gradient, largest_logit, nodes_of_tile, vocabulary_sums
from buleyean_rl.objectives.complement import Counts

UNLIKELY = -1e30  # a logit whose exponential is nothing
ENTRIES = 2048  # listed tokens whose rows of W are read at a time


class Sums(NamedTuple):
    """What a loss needs to know of a tile.

    Args:
        logits: of the listed tokens. Shape: (entries,).
        reference_logits: the reference's, 0 without one. Shape: (entries,).
        row_max: subtracted from z below. Shape: (nodes,).
        reference_row_max: subtracted from z_ref. Shape: (nodes,).
        sum_exp: sum e^z of the tokens not listed. Shape: (nodes,).
        reference_sum_exp: sum e^z_ref of them. Shape: (nodes,).
        difference: sum e^z_ref (z_ref - z) of them. Shape: (nodes,).
    """

    logits: Tensor
    reference_logits: Tensor
    row_max: Tensor
    reference_row_max: Tensor
    sum_exp: Tensor
    reference_sum_exp: Tensor
    difference: Tensor


class ReferenceSoftmax(NamedTuple):
    """A softmax at some nodes, of the tokens that are not listed there.

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

    def sums(self, states: Sequence[Tensor], counts: Counts, cached: ReferenceSoftmax | None) -> Sums:
        """Of the model's states and then the reference's, if any. Shapes: (nodes, width).

        `cached` is what `reference_softmax` computed of the reference before, if it did.
        """

    def gradient(
        self,
        lse: Tensor,
        reference_lse: Tensor,
        pi_coefficient: Tensor,
        reference_coefficient: Tensor,
        on_listed: Tensor,
    ) -> Tensor:
        """In the model's states.

        That in the logits is pi_coefficient pi - reference_coefficient P_ref, and `on_listed` on listed tokens.

        Args:
            lse: log-sum-exp of z; in fp64, as all of these. Shape: (nodes,).
            reference_lse: of z_ref. Shape: (nodes,).
            pi_coefficient: Shape: (nodes,).
            reference_coefficient: Shape: (nodes,).
            on_listed: Shape: (entries,).

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
    return StreamingLogits(head) if streams_logits(head, hidden.dtype) else MaterializedLogits(head, hidden, models)


def streams_logits(head: OutputHead, dtype: torch.dtype) -> bool:
    """Whether the softmax of a head, at states of a type, is `StreamingLogits`."""
    plain = head.bias is None and head.softcap is None
    return plain and dtype == head.weight.dtype and matmul.head_softmax_available(head.weight)


def reference_softmax(head: OutputHead, states: Tensor, counts: Counts) -> ReferenceSoftmax | None:
    """What a loss would find of a reference, if it can be known before: then it takes two of its products.

    Args:
        head: the output head.
        states: the reference's. Shape: (nodes, width).
        counts: at the nodes; their tokens are left out.
    """
    return _streaming_softmax(head, states, counts) if streams_logits(head, states.dtype) else None


class MaterializedLogits:
    """Logits in one buffer, whose gradient takes their place."""

    def __init__(self, head: OutputHead, hidden: Tensor, models: int) -> None:
        self._head, self.nodes = head, nodes_of_tile(hidden)
        self._buffer = hidden.new_empty(len(head.weight) * models * min(self.nodes, len(hidden)))

    def sums(self, states: Sequence[Tensor], counts: Counts, cached: ReferenceSoftmax | None) -> Sums:  # noqa: ARG002 - see `reference_softmax`
        """See `Softmax`."""
        head, nodes = self._head, len(states[0])
        both = torch.cat(list(states))  # one product is faster than two narrow ones
        raw = head.project(both, self._buffer[: len(head.weight) * len(both)].view(len(head.weight), len(both)))
        model, reference = raw[:, :nodes], raw[:, nodes:] if len(states) == 2 else None
        row_max = largest_logit(head, raw)
        row_max, reference_row_max = (
            row_max[:nodes],
            torch.zeros_like(row_max[:nodes]) if reference is None else row_max[nodes:],
        )
        node, listed = counts.node, (counts.option, counts.node)
        logits = head.scale_and_cap(model[listed]).double()
        reference_logits = (
            torch.zeros_like(logits) if reference is None else head.scale_and_cap(reference[listed]).double()
        )
        leaves_out = reference is not None and head.softcap is None
        if leaves_out:  # the sums leave them out: as a difference, little would be lost in much
            model[listed] = raw[:, nodes:][listed] = max(UNLIKELY, torch.finfo(raw.dtype).min)
        sums = [x.double() for x in vocabulary_sums(head, model, reference, row_max, reference_row_max)]
        if not leaves_out:
            mass, reference_mass = (logits - row_max[node]).exp(), (reference_logits - reference_row_max[node]).exp()
            listed_sums = (mass, reference_mass, reference_mass * (reference_logits - logits))
            sums = [x - counts.sum_by_node(y) for x, y in zip(sums, listed_sums, strict=True)]
        self._model, self._reference, self._listed, self._logits = model, reference, listed, logits
        return Sums(logits, reference_logits, row_max, reference_row_max, *sums)

    def gradient(
        self,
        lse: Tensor,
        reference_lse: Tensor,
        pi_coefficient: Tensor,
        reference_coefficient: Tensor,
        on_listed: Tensor,
    ) -> Tensor:
        """See `Softmax`."""
        head, model = self._head, self._model
        dtype = torch.promote_types(model.dtype, torch.float32)  # that of logits
        node_values = (x.to(dtype) for x in (lse, reference_lse, pi_coefficient, reference_coefficient))
        dense_gradient(head, model, self._reference, *node_values)
        model[self._listed] = head.scale_and_cap_backward(on_listed, self._logits).to(model.dtype)
        return head.project_backward(model)


class StreamingLogits:
    """In one pass over the vocabulary, of a head without bias and softcap: sums of W's rows, and no logits."""

    nodes = 512  # their sums take 2.4 MB at a width of 576

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def sums(self, states: Sequence[Tensor], counts: Counts, cached: ReferenceSoftmax | None) -> Sums:
        """See `Softmax`."""
        head, hidden = self._head, states[0]
        logits = [torch.zeros_like(counts.count, dtype=torch.float64) for _ in range(2)]
        for entries, node, tokens in self._tokens(counts):
            for x, each in zip(states, logits, strict=False):
                each[entries] = head.scale * torch.linalg.vecdot(x[node].float(), tokens).double()
        hidden_difference = -hidden.float()
        if len(states) == 2:
            hidden_difference += states[1]
            reference = cached or _streaming_softmax(head, states[1], counts)
        else:
            reference = self._uniform(counts)
        model = _streaming_softmax(head, hidden, counts)
        self._model, self._reference, self._counts = model, reference, counts
        row_max, reference_row_max = (x.lse.nan_to_num(neginf=0.0) for x in (model, reference))
        sum_exp, reference_sum_exp = (model.lse - row_max).exp(), (reference.lse - reference_row_max).exp()
        difference = reference_sum_exp * head.scale * torch.linalg.vecdot(reference.mean, hidden_difference).double()
        return Sums(logits[0], logits[1], row_max, reference_row_max, sum_exp, reference_sum_exp, difference)

    def gradient(
        self,
        lse: Tensor,
        reference_lse: Tensor,
        pi_coefficient: Tensor,
        reference_coefficient: Tensor,
        on_listed: Tensor,
    ) -> Tensor:
        """See `Softmax`."""
        model, reference = self._model, self._reference
        del self._model, self._reference  # before the next tile's are made
        a, b = pi_coefficient * (model.lse - lse).exp(), reference_coefficient * (reference.lse - reference_lse).exp()
        gradient = model.mean.mul_(a.float().unsqueeze(1)).addcmul_(reference.mean, b.float().unsqueeze(1), value=-1)
        for entries, node, tokens in self._tokens(self._counts):
            gradient.index_add_(0, node, tokens.mul_(on_listed[entries].float().unsqueeze(1)))
        return gradient.mul_(self._head.scale)

    def _tokens(self, counts: Counts) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some entries after the other, their nodes and W's rows, in fp32. Shapes: (entries,), (entries, width)."""
        for start in range(0, len(counts.option), ENTRIES):
            entries = slice(start, start + ENTRIES)
            yield entries, counts.node[entries], self._head.weight[counts.option[entries]].float()

    def _uniform(self, counts: Counts) -> ReferenceSoftmax:
        """Where all logits are zero."""
        head = self._head
        sum_exp = len(head.weight) - counts.sum_by_node(torch.ones_like(counts.count)).double()
        rows = head.rows_sum.expand(len(sum_exp), -1).clone()
        for _, node, tokens in self._tokens(counts):
            rows.index_add_(0, node, tokens, alpha=-1)
        return ReferenceSoftmax(sum_exp.log(), rows / sum_exp.clamp_min(1).float().unsqueeze(1))


def _streaming_softmax(head: OutputHead, states: Tensor, counts: Counts) -> ReferenceSoftmax:
    row_max, sum_exp, mean = matmul.head_softmax(
        head.weight, states.contiguous(), head.scale, counts.option, counts.node
    )
    return ReferenceSoftmax(row_max.double() + sum_exp.double().log(), mean)
