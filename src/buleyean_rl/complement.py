"""The complement distribution and the least possible loss: pure functions of rejection counts.

An option i was rejected v_i times in T rounds. Its weight is what is left of the rounds, plus one:

    w_i = (T - min(v_i, T) + 1)^tau            P(i) = mu_i w_i / sum_j mu_j w_j            (1)

for a base measure mu > 0. Every weight is at least 1, so no option ever dies (positivity); P sums to one
(normalisation); and of two options the more rejected has the smaller P / mu (monotonicity).

A loss  L(pi) = alpha KL(P || pi) + (1 - alpha) C(pi)  is convex in the distribution pi, so it has a floor:
a least value L* that no model can beat. `L - L*` is the optimality gap.

Nothing here knows of tokens, models or files. `exact_target` is the function the proofs are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

SOLVER_STEPS = 100  # bisection halves the bracket each time: beyond double precision, and still cheap


def exact_target(
    counts: Sequence[int], rounds: int, base: Sequence[int | Fraction] | None = None
) -> list[Fraction]:
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
