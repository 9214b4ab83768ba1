"""The complement distribution and the least possible loss: pure functions of rejection counts.

An option i was rejected v_i times in T rounds. Its weight is what is left of the rounds, plus one:

    w_i = (T - min(v_i, T) + 1)^tau            P(i) = mu_i w_i / sum_j mu_j w_j            (1)

for a base measure mu > 0. Every weight is at least 1, so no option ever dies (positivity); P sums to one
(normalisation); and of two options the more rejected has the smaller P / mu (monotonicity).

A loss  L(pi) = alpha KL(P || pi) + (1 - alpha) C(pi)  is convex in the distribution pi, so it has a floor:
a least value L* that no model can beat. `L - L*` is the optimality gap. Below, a_i = min(v_i, T) / T is the
share of the rounds that rejected option i.

Nothing here knows of tokens, models or files. `exact_target` is the function the proofs are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

SOLVER_STEPS = 60  # were all of them bisections, each halving the bracket; Newton's method takes some 6
SOLVED = 1e-12  # of lam: the floor is a minimum, and errs by the square of it


def exact_target(counts: Sequence[int], rounds: int, base: Sequence[int | Fraction] | None = None) -> list[Fraction]:
    """The complement distribution (1) at tau = 1, in exact rational arithmetic.

    Args:
        counts: v_i >= 0, one per option; clipped at `rounds`.
        rounds: T >= 1.
        base: mu_i > 0 up to a common factor; uniform if None.

    Returns:
        P(i), one per option, summing to exactly 1.
    """
    measure = [Fraction(1)] * len(counts) if base is None else [Fraction(mu) for mu in base]
    mass = [mu * (rounds - min(v, rounds) + 1) for mu, v in zip(measure, counts, strict=True)]
    total = sum(mass)
    return [m / total for m in mass]


def weights(counts: Tensor, rounds: Tensor, tau: float = 1.0) -> Tensor:
    """w_i of equation (1).

    Args:
        counts: rejection counts v_i. Shape: any.
        rounds: T, broadcastable against `counts`.
        tau: strength; 1 is the published weight.
    """
    return (rounds - torch.minimum(counts, rounds) + 1) ** tau


def target(counts: Tensor, rounds: Tensor, base: Tensor | None = None, tau: float = 1.0) -> Tensor:
    """P of equation (1), dense over the options.

    Args:
        counts: v_i. Shape: (..., options).
        rounds: T. Shape: (...,).
        base: mu_i. Shape: (..., options); uniform if None.
        tau: strength.

    Returns:
        Probabilities. Shape: (..., options).
    """
    mass = weights(counts, rounds.unsqueeze(-1), tau)
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
        rounds: T of every node. Shape: (nodes,), floating.
    """

    node: Tensor
    option: Tensor
    count: Tensor
    rounds: Tensor

    def to(self, device: torch.device) -> Counts:
        """The same counts on another device."""
        return Counts(self.node.to(device), self.option.to(device), self.count.to(device), self.rounds.to(device))

    def astype(self, dtype: torch.dtype) -> Counts:
        """The same counts in another floating type."""
        return Counts(self.node, self.option, self.count.to(dtype), self.rounds.to(dtype))

    def rows(self, nodes: slice) -> Counts:
        """The counts of a range of nodes, renumbered from 0. Entries must be sorted by node."""
        bounds = torch.tensor([nodes.start, nodes.stop], device=self.node.device)
        first, last = torch.searchsorted(self.node, bounds).tolist()
        return Counts(
            self.node[first:last] - nodes.start,
            self.option[first:last],
            self.count[first:last],
            self.rounds[nodes],
        )

    def dense(self, values: Tensor, options: int) -> Tensor:
        """Per-entry `values` (entries,) as a matrix, 0 elsewhere. Shape: (nodes, options)."""
        matrix = values.new_zeros(len(self.rounds), options)
        matrix[self.node, self.option] = values
        return matrix

    @property
    def rate(self) -> Tensor:
        """Share of the rounds that rejected each entry, min(v, T) / T. Shape: (entries,)."""
        rounds = self.rounds[self.node]
        return torch.minimum(self.count, rounds) / rounds

    def sum_by_node(self, values: Tensor) -> Tensor:
        """Sum per-entry `values` (entries,) over each node. Shape: (nodes,)."""
        return values.new_zeros(len(self.rounds)).index_add_(0, self.node, values)


class SparseTarget(NamedTuple):
    """The complement distribution where it differs from a multiple of its base measure.

    With r_i = w_i / (T + 1)^tau on rejected options and 1 elsewhere, P_i = mu_i r_i / Z and
    Z = what mu leaves the options never rejected + sum over rejected i of mu_i r_i.

    Args:
        ratio: r_i. Shape: (entries,).
        normaliser: Z. Shape: (nodes,).
        rejected: P_i. Shape: (entries,).
        rest: probability of all the options never rejected. Shape: (nodes,).
    """

    ratio: Tensor
    normaliser: Tensor
    rejected: Tensor
    rest: Tensor


def sparse_target(
    counts: Counts, base: Tensor, options: int | Tensor, tau: float = 1.0, left: Tensor | None = None
) -> SparseTarget:
    """P of equation (1) from the base measure of the rejected options alone.

    Args:
        counts: the rejections.
        base: mu_i of each rejected option, mu summing to one over all options. Shape: (entries,).
        options: how many options there are; of each node, if they differ. Shape: (nodes,).
        tau: strength.
        left: what mu leaves the options never rejected, if known better than as 1 - sum(base). Shape: (nodes,).
    """
    rounds = counts.rounds[counts.node]
    ratio = (weights(counts.count, rounds) / (rounds + 1)) ** tau  # of bases: powers of both could overflow
    # mu > 0 everywhere, so something is left unless every option is rejected, however it rounds
    some_left = counts.sum_by_node(torch.ones_like(base)) < options
    left = 1 - counts.sum_by_node(base) if left is None else left
    left = torch.where(some_left, left.clamp_min(torch.finfo(base.dtype).tiny), 0)
    normaliser = left + counts.sum_by_node(base * ratio)
    return SparseTarget(ratio, normaliser, base * ratio / normaliser[counts.node], left / normaliser)


def published_floor(counts: Counts, options: int, alpha: float, tau: float = 1.0) -> Tensor:
    """Least value of alpha KL(P || pi) - (1 - alpha) sum_i a_i log pi_i, for P on a uniform base.

    Both terms are cross-entropies, towards q_i = alpha P_i + (1 - alpha) a_i. The least is at
    pi = q / Q with Q = sum q:  L* = -alpha H(P) - sum_i q_i log(q_i / Q).

    Args:
        counts: the rejections.
        options: how many options there are.
        alpha: weight of the KL.
        tau: strength.

    Returns:
        L* in nats. Shape: (nodes,).
    """
    P = sparse_target(counts, torch.full_like(counts.count, 1 / options), options, tau)
    unrejected = options - counts.sum_by_node(torch.ones_like(counts.count))
    each = P.rest / unrejected.clamp_min(1)  # every option never rejected has the same probability
    q = alpha * P.rejected + (1 - alpha) * counts.rate
    total = counts.sum_by_node(q) + alpha * P.rest
    entropy = -counts.sum_by_node(torch.xlogy(P.rejected, P.rejected)) - torch.xlogy(P.rest, each)
    cross_entropy = -counts.sum_by_node(q * (q.log() - total.log()[counts.node]))
    cross_entropy = cross_entropy - torch.xlogy(alpha * P.rest, alpha * each / total)
    return cross_entropy - alpha * entropy


def complement_optimum(counts: Counts, target: SparseTarget, alpha: float) -> tuple[Tensor, Tensor]:
    """The pi that minimises alpha KL(P || pi) - (1 - alpha) sum_i a_i log(1 - pi_i).

    Setting the gradient of the Lagrangian to zero gives pi_i = alpha P_i / lam for options never
    rejected, and for the others the smaller root of

        lam pi^2 - (alpha P_i + b_i + lam) pi + alpha P_i = 0,      b_i = (1 - alpha) a_i,

    where lam makes pi sum to one. The sum falls as lam grows, so lam is found by Newton's method, on the sum's
    inverse, which is linear where nothing is rejected, and by bisection where that leads astray.

    Args:
        counts: the rejections.
        target: P.
        alpha: weight of the KL, in (0, 1].

    Returns:
        pi of the rejected options, shape (entries,), and lam, shape (nodes,).
    """
    node = counts.node
    aP = alpha * target.rejected.double()
    b = (1 - alpha) * counts.rate.double()
    rest = alpha * target.rest.double()

    def rejected_at(lam: Tensor) -> tuple[Tensor, Tensor]:
        """pi of the rejected options, and how it falls with lam."""
        s = aP + b + lam[node]
        root = (s * s - 4 * lam[node] * aP).clamp_min(0).sqrt()
        pi = 2 * aP / (s + root)
        return pi, pi * (pi - 1) / root

    # At lam = alpha the sum is at most one. Below: with lam = rest the others alone already sum to one;
    # where every option is rejected (rest = 0) lam may be negative, though above
    # -2 max b: some pi_i is at most a half, and there lam = alpha P_i / pi_i - b_i / (1 - pi_i).
    low = torch.where(rest > 0, rest, -2 * counts.sum_by_node(b) - 1)
    high = lam = torch.full_like(rest, alpha)
    for _ in range(SOLVER_STEPS):
        pi, slope = (counts.sum_by_node(each) for each in rejected_at(lam))
        others = torch.where(rest > 0, rest / lam, 0)
        total, slope = others + pi, torch.where(rest > 0, slope - others / lam, slope)
        low, high = torch.where(total > 1, lam, low), torch.where(total > 1, high, lam)
        middle = torch.where(rest > 0, (low * high).clamp_min(0).sqrt(), (low + high) / 2)
        newton = lam - (total - 1) * total / slope
        solved = (newton - lam).abs() <= SOLVED * lam.abs()
        if solved.all():
            break
        lam = torch.where(solved, lam, torch.where((low < newton) & (newton < high), newton, middle))
    lam = torch.where(solved, lam, high)
    return rejected_at(lam)[0], lam


def complement_floor(counts: Counts, target: SparseTarget, alpha: float) -> Tensor:
    """Least value of alpha KL(P || pi) - (1 - alpha) sum_i a_i log(1 - pi_i).

    Args:
        counts: the rejections.
        target: P, on any base measure.
        alpha: weight of the KL, in (0, 1].

    Returns:
        L* in nats. Shape: (nodes,).
    """
    best, lam = complement_optimum(counts, target, alpha)
    P, rest = target.rejected.double(), target.rest.double()
    kl = torch.xlogy(rest, lam / alpha).where(rest > 0, 0) + counts.sum_by_node(torch.xlogy(P, P / best))
    contrast = -counts.sum_by_node(torch.special.xlog1py((1 - alpha) * counts.rate.double(), -best))
    return (alpha * kl + contrast).to(target.rest.dtype)
