"""The complement distribution and the irreducible loss of `published`: pure functions of rejection counts.

Option i was up for rejection n_i times and rejected v_i times. Relative to an option that was never up, r = 1:

    r_i = (n_i - min(v_i, n_i) + 1) / (n_i + 1)            P(i) = mu_i r_i^tau / sum_j mu_j r_j^tau            (1)

for a base measure mu > 0. Every ratio is above 0 and at most 1, so P is positive; P sums to one; of two options with
the same n the one rejected more often has the smaller P / mu (monotonicity); and an option's ratio depends on its own
rounds alone. With one n_i = T for all options P is the published formula, mu_i (T - v_i + 1) up to a factor. The
rejection rate of option i is c_i = min(v_i, n_i) / n_i.

Nothing here knows of tokens, models or files. `exact_target` is the function that the proofs in `formal/` are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


def exact_target(
    counts: Sequence[int], rounds: int | Sequence[int], base: Sequence[int | Fraction] | None = None
) -> list[Fraction]:
    """The complement distribution (1) at tau = 1, in exact rational arithmetic.

    Args:
        counts: v_i >= 0, one per option; clipped at its rounds.
        rounds: n_i >= 0, one per option, or one for all.
        base: mu_i > 0 up to a common factor; uniform if None.

    Returns:
        P(i), one per option, summing to exactly 1.
    """
    measure = [Fraction(1)] * len(counts) if base is None else [Fraction(mu) for mu in base]
    judged = [rounds] * len(counts) if isinstance(rounds, int) else rounds
    mass = [mu * Fraction(n - min(v, n) + 1, n + 1) for mu, v, n in zip(measure, counts, judged, strict=True)]
    total = sum(mass)
    return [m / total for m in mass]


def ratios(counts: Tensor, rounds: Tensor, tau: float = 1.0) -> Tensor:
    """r_i^tau of equation (1).

    Args:
        counts: rejection counts v_i. Shape: any.
        rounds: n_i, broadcastable against `counts`.
        tau: exponent; 1 is the published weight.
    """
    # not a quotient of powers: they could overflow
    return ((rounds - torch.minimum(counts, rounds) + 1) / (rounds + 1)) ** tau


def target(counts: Tensor, rounds: Tensor, base: Tensor | None = None, tau: float = 1.0) -> Tensor:
    """P of equation (1), dense over the options.

    Args:
        counts: v_i. Shape: (..., options).
        rounds: n_i, broadcastable against `counts`.
        base: mu_i. Shape: (..., options); uniform if None.
        tau: exponent of the ratios.

    Returns:
        Probabilities. Shape: (..., options).
    """
    mass = ratios(counts, rounds, tau)
    if base is not None:
        mass = mass * base
    return mass / mass.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Counts:
    """Rejection counts of a batch of nodes, sparse: options never rejected at a node are not stored.

    Args:
        node: which node each entry belongs to. Shape: (entries,), int64.
        option: the rejected option, at most once per node. Shape: (entries,), int64.
        count: v >= 1. Shape: (entries,), floating.
        rounds: n >= 1. Shape: (entries,), floating.
        nodes: how many nodes there are, those without an entry included.
    """

    node: Tensor
    option: Tensor
    count: Tensor
    rounds: Tensor
    nodes: int

    def to(self, device: torch.device) -> Counts:
        """The same counts on another device."""
        return Counts(
            self.node.to(device), self.option.to(device), self.count.to(device), self.rounds.to(device), self.nodes
        )

    def astype(self, dtype: torch.dtype) -> Counts:
        """The same counts in another floating type."""
        return Counts(self.node, self.option, self.count.to(dtype), self.rounds.to(dtype), self.nodes)

    def select(self, nodes: slice) -> Counts:
        """The counts of a range of nodes, renumbered from 0. Entries must be sorted by node."""
        bounds = torch.tensor([nodes.start, nodes.stop], device=self.node.device)
        first, last = torch.searchsorted(self.node, bounds).tolist()
        entries = slice(first, last)
        return Counts(
            self.node[entries] - nodes.start,
            self.option[entries],
            self.count[entries],
            self.rounds[entries],
            min(nodes.stop, self.nodes) - nodes.start,
        )

    def dense(self, values: Tensor, options: int) -> Tensor:
        """Per-entry `values` (entries,) as a matrix, 0 elsewhere. Shape: (nodes, options)."""
        matrix = values.new_zeros(self.nodes, options)
        matrix[self.node, self.option] = values
        return matrix

    @property
    def rate(self) -> Tensor:
        """The rejection rate c = min(v, n) / n of each entry. Shape: (entries,)."""
        return torch.minimum(self.count, self.rounds) / self.rounds

    def sum_by_node(self, values: Tensor) -> Tensor:
        """Sum per-entry `values` (entries,) over each node. Shape: (nodes,)."""
        return values.new_zeros(self.nodes).index_add_(0, self.node, values)


class SparseTarget(NamedTuple):
    """The complement distribution where it differs from a multiple of its base measure.

    With r_i^tau, below r_i, on rejected options and 1 elsewhere, P_i = mu_i r_i / Z and
    Z = mu of the unrejected options + sum over rejected i of mu_i r_i.

    Args:
        ratio: r_i^tau. Shape: (entries,).
        normaliser: Z. Shape: (nodes,).
        rejected: P_i. Shape: (entries,).
        unrejected: probability of all unrejected options together. Shape: (nodes,).
    """

    ratio: Tensor
    normaliser: Tensor
    rejected: Tensor
    unrejected: Tensor


def sparse_target(
    counts: Counts, base: Tensor, options: int | Tensor, tau: float = 1.0, unrejected_base: Tensor | None = None
) -> SparseTarget:
    """P of equation (1) from the base measure of the rejected options alone.

    Args:
        counts: the rejections.
        base: mu_i of each rejected option, mu summing to one over all options. Shape: (entries,).
        options: number of options; of each node, if they differ. Shape: (nodes,).
        tau: exponent of the ratios.
        unrejected_base: mu of the unrejected options together, where it is available more precisely than as
            1 - sum(base). Shape: (nodes,).
    """
    ratio = ratios(counts.count, counts.rounds, tau)
    # mu > 0 everywhere, so some of it is unrejected unless every option is rejected, whatever rounding says
    some_unrejected = counts.sum_by_node(torch.ones_like(base)) < options
    unrejected = 1 - counts.sum_by_node(base) if unrejected_base is None else unrejected_base
    unrejected = torch.where(some_unrejected, unrejected.clamp_min(torch.finfo(base.dtype).tiny), 0)
    normaliser = unrejected + counts.sum_by_node(base * ratio)
    return SparseTarget(ratio, normaliser, base * ratio / normaliser[counts.node], unrejected / normaliser)


def published_floor(counts: Counts, options: int, alpha: float, tau: float = 1.0) -> Tensor:
    """Irreducible loss: the least alpha KL(P || pi) - (1 - alpha) sum_i c_i log pi_i, for P on a uniform base.

    Both terms are cross-entropies, towards q_i = alpha P_i + (1 - alpha) c_i. The minimum is at
    pi = q / Q with Q = sum q:  L* = -alpha H(P) - sum_i q_i log(q_i / Q).

    Args:
        counts: the rejections.
        options: number of options.
        alpha: weight of the KL.
        tau: exponent of the ratios.

    Returns:
        L* in nats. Shape: (nodes,).
    """
    P = sparse_target(counts, torch.full_like(counts.count, 1 / options), options, tau)
    unrejected = options - counts.sum_by_node(torch.ones_like(counts.count))
    each = P.unrejected / unrejected.clamp_min(1)  # all unrejected options have the same probability
    q = alpha * P.rejected + (1 - alpha) * counts.rate
    total = counts.sum_by_node(q) + alpha * P.unrejected
    entropy = -counts.sum_by_node(torch.xlogy(P.rejected, P.rejected)) - torch.xlogy(P.unrejected, each)
    cross_entropy = -counts.sum_by_node(q * (q.log() - total.log()[counts.node]))
    cross_entropy = cross_entropy - torch.xlogy(alpha * P.unrejected, alpha * each / total)
    return cross_entropy - alpha * entropy
