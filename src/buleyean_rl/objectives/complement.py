"""The complement distribution and the irreducible loss of `published`: pure functions of rejection counts.

Option i was up for rejection n_i times and rejected v_i times. Relative to an option that was never up, r = 1:

    r_i = (n_i - min(v_i, n_i) + k m) / ((n_i + k) m)      P(i) = mu_i r_i^tau / sum_j mu_j r_j^tau            (1)

for a base measure mu > 0. r_i m is the posterior mean of "not rejected" under a Beta(k m, k (1 - m)) prior: m is
presumed of an option that was never up, and is worth k rounds (see `Prior`). Every ratio is above 0, so P is positive;
P sums to one; of two options with the same n the one rejected more often has the smaller P / mu (monotonicity); and an
option's ratio depends on its own rounds alone. With m = k = 1 and one n_i = T for all options P is the published
formula, mu_i (T - v_i + 1) up to a factor. The rejection rate of option i is c_i = min(v_i, n_i) / n_i.

The mass that rejections take goes to all options in proportion. With a `min_p` it goes, in proportion, to those that
are plausible once the rejected ones are gone, and the others, the tail, keep their probability:

    S = {j : n_j > 0 or mu_j >= min_p max over r_i >= 1 of mu_i}      Z = sum_S mu_i r_i^tau / sum_S mu_i
    P(i) = mu_i r_i^tau / Z in S, mu_i outside: (1) with r_i^tau = Z in the tail                               (1a)

Nothing here knows of tokens, models or files. `exact_target` is the function that the proofs in `formal/` are about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.errors import UsageError


@dataclass(frozen=True)
class Prior:
    """What is presumed of an option before it was ever up: m and k of equation (1).

    Args:
        mean: m, how often it is not rejected, in (0, 1]. With 1 no ratio is above 1; with less, what was rejected less
            often than presumed rises.
        rounds: k, what m is worth in rounds, above 0.
        capped: whether ratios above 1 count as 1, so that nothing rises.

    Raises:
        UsageError: a value is outside its range.
    """

    mean: float | Fraction = 1.0
    rounds: float | Fraction = 1.0
    capped: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mean <= 1:
            raise UsageError(f"the prior mean must be above 0 and at most 1, not {self.mean}")
        if not 0 < self.rounds < math.inf:
            raise UsageError(f"the prior rounds must be above 0 and finite, not {self.rounds}")


PUBLISHED = Prior()


def share_accepted(counts: Sequence[int], rounds: Sequence[int]) -> float:
    """The prior mean m that judged answers of the model itself suggest: the share of their rounds that accepted.

    Args:
        counts: rejections of each answer, all answers of a file together.
        rounds: rounds of each.

    Returns:
        In (0, 1]; 1 where nothing was accepted, which says nothing of what a usual answer is like.
    """
    judged = sum(rounds)
    accepted = judged - sum(map(min, counts, rounds))
    return accepted / judged if accepted else 1.0


def exact_target(
    counts: Sequence[int],
    rounds: int | Sequence[int],
    base: Sequence[int | Fraction] | None = None,
    prior: Prior = PUBLISHED,
    min_p: float | Fraction = 0,
) -> list[Fraction]:
    """The complement distribution (1) or (1a) at tau = 1, in exact rational arithmetic.

    Args:
        counts: v_i >= 0, one per option; clipped at its rounds.
        rounds: n_i >= 0, one per option, or one for all.
        base: mu_i > 0 up to a common factor; uniform if None.
        prior: m and k, exact if they are fractions.
        min_p: of equation (1a), at most 1, exact if it is a fraction; 0 for (1).

    Returns:
        P(i), one per option, summing to exactly 1.
    """
    sizes = [Fraction(1)] * len(counts) if base is None else [Fraction(mu) for mu in base]
    total = sum(sizes)
    measure = [mu / total for mu in sizes]
    judged = [rounds] * len(counts) if isinstance(rounds, int) else rounds
    m, k = Fraction(prior.mean), Fraction(prior.rounds)
    ratio = [(n - min(v, n) + k * m) / ((n + k) * m) for v, n in zip(counts, judged, strict=True)]
    if prior.capped:
        ratio = [min(r, Fraction(1)) for r in ratio]
    likeliest = max((mu for mu, r in zip(measure, ratio, strict=True) if r >= 1), default=Fraction(0))
    moves = [n > 0 or mu >= Fraction(min_p) * likeliest for mu, n in zip(measure, judged, strict=True)]
    options = list(zip(measure, ratio, moves, strict=True))
    mass = sum((mu * r for mu, r, moving in options if moving), Fraction())
    normaliser = mass / sum((mu for mu, _, moving in options if moving), Fraction())
    return [mu * r / normaliser if moving else mu for mu, r, moving in options]


def ratios(counts: Tensor, rounds: Tensor, tau: float = 1.0, prior: Prior = PUBLISHED) -> Tensor:
    """r_i^tau of equation (1).

    Args:
        counts: rejection counts v_i. Shape: any.
        rounds: n_i, broadcastable against `counts`.
        tau: exponent; 1 is the published weight.
        prior: m and k.
    """
    m, k = float(prior.mean), float(prior.rounds)
    ratio = (rounds - torch.minimum(counts, rounds) + k * m) / ((rounds + k) * m)
    # not a quotient of powers: they could overflow
    return (ratio.clamp_max(1) if prior.capped else ratio) ** tau


def plausible(log_base: Tensor, min_p: float) -> Tensor:
    """Which options are at least `min_p` times as likely as the likeliest.

    Args:
        log_base: log mu_i up to a constant; -inf for those with a ratio below 1. Shape: (..., options).
        min_p: above 0.
    """
    return log_base >= log_base.amax(-1, keepdim=True) + math.log(min_p)


def tilt(
    counts: Tensor, rounds: Tensor, base: Tensor, tau: float = 1.0, prior: Prior = PUBLISHED, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What P is made of, dense over the options: P_i = mu_i ratio_i / Z.

    Args:
        counts: v_i. Shape: (..., options).
        rounds: n_i, broadcastable against `counts`.
        base: mu_i; with a `min_p` summing to one. Shape: (..., options).
        tau: exponent of the ratios.
        prior: m and k.
        min_p: of equation (1a); 0 for (1).

    Returns:
        The ratios r_i^tau, in the tail of (1a) Z, and Z. Shapes: (..., options), (..., 1).
    """
    ratio = ratios(counts, rounds, tau, prior)
    mass = base * ratio
    if not min_p:
        return ratio, mass.sum(-1, keepdim=True)
    moves = (rounds > 0) | plausible(base.log().masked_fill(ratio < 1, -math.inf), min_p)
    normaliser = (mass * moves).sum(-1, keepdim=True) / (base * moves).sum(-1, keepdim=True)
    return torch.where(moves, ratio, normaliser), normaliser


def target(
    counts: Tensor,
    rounds: Tensor,
    base: Tensor | None = None,
    tau: float = 1.0,
    prior: Prior = PUBLISHED,
    min_p: float = 0.0,
) -> Tensor:
    """P of equation (1) or (1a), dense over the options.

    Args:
        counts: see `tilt`.
        rounds: see `tilt`.
        base: see `tilt`; uniform if None.
        tau: see `tilt`.
        prior: see `tilt`.
        min_p: see `tilt`.

    Returns:
        Probabilities. Shape: (..., options).
    """
    if base is None:
        base, min_p = torch.ones_like(counts), 0.0  # all are equally plausible
    ratio, normaliser = tilt(counts, rounds, base, tau, prior, min_p)
    return base * ratio / normaliser


@dataclass(frozen=True)
class Counts:
    """Counts of a batch of nodes, sparse: options that are not listed at a node were never up there.

    Args:
        node: which node each entry belongs to. Shape: (entries,), int64.
        option: the judged option, at most once per node. Shape: (entries,), int64.
        count: v >= 0. Shape: (entries,), floating.
        rounds: n >= 0. Shape: (entries,), floating.
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

    def with_unseen(self, node: Tensor, option: Tensor) -> Counts:
        """These counts, and entries of options that were never up, v = n = 0; sorted by node. Shapes: (added,)."""
        zeros = self.count.new_zeros(len(node))
        nodes, options = torch.cat([self.node, node]), torch.cat([self.option, option])
        count, rounds = torch.cat([self.count, zeros]), torch.cat([self.rounds, zeros])
        order = nodes.argsort(stable=True)
        return Counts(nodes[order], options[order], count[order], rounds[order], self.nodes)

    def dense(self, values: Tensor, options: int) -> Tensor:
        """Per-entry `values` (entries,) as a matrix, 0 elsewhere. Shape: (nodes, options)."""
        matrix = values.new_zeros(self.nodes, options)
        matrix[self.node, self.option] = values
        return matrix

    @property
    def rate(self) -> Tensor:
        """The rejection rate c = min(v, n) / n of each entry, 0 of an unseen one. Shape: (entries,)."""
        return torch.minimum(self.count, self.rounds) / self.rounds.clamp_min(1)

    def sum_by_node(self, values: Tensor) -> Tensor:
        """Sum per-entry `values` (entries,) over each node. Shape: (nodes,)."""
        return values.new_zeros(self.nodes).index_add_(0, self.node, values)


class SparseTarget(NamedTuple):
    """The complement distribution, from its base measure on the listed options alone.

    With r_i^tau, below r_i, on listed options and one r on all others, P_i = mu_i r_i / Z and
    Z = r mu of the unlisted options + sum over listed i of mu_i r_i.

    Args:
        ratio: r_i^tau. Shape: (entries,).
        unlisted_ratio: r, 1 by (1) and Z by (1a). Shape: (nodes,).
        normaliser: Z. Shape: (nodes,).
        listed: P_i. Shape: (entries,).
        unlisted: probability of all unlisted options together. Shape: (nodes,).
    """

    ratio: Tensor
    unlisted_ratio: Tensor
    normaliser: Tensor
    listed: Tensor
    unlisted: Tensor


def sparse_target(
    counts: Counts,
    base: Tensor,
    options: int | Tensor,
    tau: float = 1.0,
    prior: Prior = PUBLISHED,
    unlisted_base: Tensor | None = None,
    keep_tail: bool = False,
) -> SparseTarget:
    """P of equation (1) from the base measure of the listed options alone.

    Args:
        counts: of the listed options.
        base: mu_i of each listed option, mu summing to one over all options. Shape: (entries,).
        options: number of options; of each node, if they differ. Shape: (nodes,).
        tau: exponent of the ratios.
        prior: m and k.
        unlisted_base: mu of the unlisted options together, where it is available more precisely than as
            1 - sum(base). Shape: (nodes,).
        keep_tail: whether unlisted options keep their probability, as by (1a) with all of S listed.
    """
    ratio = ratios(counts.count, counts.rounds, tau, prior)
    listed_base, mass = counts.sum_by_node(base), counts.sum_by_node(base * ratio)
    # mu > 0 everywhere, so some of it is unlisted unless every option is listed, whatever rounding says
    some_unlisted = counts.sum_by_node(torch.ones_like(base)) < options
    unlisted = 1 - listed_base if unlisted_base is None else unlisted_base
    unlisted = torch.where(some_unlisted, unlisted.clamp_min(torch.finfo(base.dtype).tiny), 0)
    if keep_tail:
        normaliser = torch.where(listed_base > 0, mass / listed_base, 1)
        unlisted_ratio = normaliser
    else:
        normaliser = unlisted + mass
        unlisted_ratio = torch.ones_like(normaliser)
    listed = base * ratio / normaliser[counts.node]
    return SparseTarget(ratio, unlisted_ratio, normaliser, listed, unlisted * unlisted_ratio / normaliser)


def published_floor(counts: Counts, options: int, alpha: float, tau: float = 1.0, prior: Prior = PUBLISHED) -> Tensor:
    """Irreducible loss: the least alpha KL(P || pi) - (1 - alpha) sum_i c_i log pi_i, for P on a uniform base.

    Both terms are cross-entropies, towards q_i = alpha P_i + (1 - alpha) c_i. The minimum is at
    pi = q / Q with Q = sum q:  L* = -alpha H(P) - sum_i q_i log(q_i / Q).

    Args:
        counts: of the listed options.
        options: number of options.
        alpha: weight of the KL.
        tau: exponent of the ratios.
        prior: m and k.

    Returns:
        L* in nats. Shape: (nodes,).
    """
    P = sparse_target(counts, torch.full_like(counts.count, 1 / options), options, tau, prior)
    unlisted = options - counts.sum_by_node(torch.ones_like(counts.count))
    each = P.unlisted / unlisted.clamp_min(1)  # all unlisted options have the same probability
    q = alpha * P.listed + (1 - alpha) * counts.rate
    total = counts.sum_by_node(q) + alpha * P.unlisted
    entropy = -counts.sum_by_node(torch.xlogy(P.listed, P.listed)) - torch.xlogy(P.unlisted, each)
    cross_entropy = -counts.sum_by_node(q * (q.log() - total.log()[counts.node]))
    cross_entropy = cross_entropy - torch.xlogy(alpha * P.unlisted, alpha * each / total)
    return cross_entropy - alpha * entropy
