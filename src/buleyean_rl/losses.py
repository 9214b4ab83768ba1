"""The token objectives, dense: short, slow, and the reference that `fused` is checked against.

Each loss is, at every node of a void boundary,

    L = alpha KL(P || pi) + (1 - alpha) C                                                  (2)

with P the complement distribution over the vocabulary, pi the model's next-token distribution and
a_i = min(v_i, T) / T the share of the rounds that rejected token i:

    published    P on a uniform base;         C = -sum_i a_i log pi_i                      (3)
    complement   P on the frozen base model;  C = -sum_i a_i log(1 - pi_i)                 (4)

(3) is the published loss, kept as it is: its contrast is a cross-entropy *towards* the rejected tokens.
(4) is unlikelihood (Welleck et al., 2020). No trainer is needed to call any of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from buleyean_rl import complement
from buleyean_rl.complement import Counts
from buleyean_rl.errors import UsageError

ObjectiveName = Literal["complement", "published"]


@dataclass(frozen=True)
class Objective:
    """Which loss, and how strong.

    Args:
        name: `complement` or `published`.
        alpha: weight of the KL against the contrast, in (0, 1].
        tau: strength of the complement weights, above 0; 1 is the published formula.
    """

    name: ObjectiveName = "complement"
    alpha: float = 0.7
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ObjectiveName):
            raise UsageError(f"unknown objective {self.name!r}: choose one of {', '.join(get_args(ObjectiveName))}")
        if not 0 < self.alpha <= 1:
            raise UsageError(f"alpha must be above 0 and at most 1, not {self.alpha}")
        if not 0 < self.tau < math.inf:
            raise UsageError(f"tau must be above 0 and finite, not {self.tau}")

    @property
    def uses_reference(self) -> bool:
        """Whether the base measure is the frozen base model."""
        return self.name == "complement"


class NodeLosses(NamedTuple):
    """What the objective is worth at each node, in nats. Every field has shape (nodes,).

    Args:
        loss: L, differentiable.
        kl: KL(P || pi), detached.
        contrast: C, detached.
        floor: the least L of any distribution, detached.
    """

    loss: Tensor
    kl: Tensor
    contrast: Tensor
    floor: Tensor


def published_loss(logits: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (3).

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        counts: rejections over the vocabulary at each node.
        objective: alpha and tau.
    """
    log_pi = logits.log_softmax(-1)
    v, T = counts.dense(counts.count, logits.shape[-1]), counts.rounds
    P = complement.target(v, T, tau=objective.tau)
    kl = (torch.xlogy(P, P) - P * log_pi).sum(-1)
    contrast = -(counts.dense(counts.rate, logits.shape[-1]) * log_pi).sum(-1)
    floor = complement.published_floor(counts, logits.shape[-1], objective.alpha, objective.tau)
    return _combine(kl, contrast, floor, objective.alpha)


def complement_loss(logits: Tensor, reference_logits: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (4).

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        reference_logits: the frozen base model's. Shape: (nodes, vocabulary).
        counts: rejections over the vocabulary at each node.
        objective: alpha and tau.
    """
    log_pi = logits.log_softmax(-1)
    reference = reference_logits.detach().softmax(-1)
    v, T = counts.dense(counts.count, logits.shape[-1]), counts.rounds
    P = complement.target(v, T, reference, objective.tau)
    kl = (torch.xlogy(P, P) - P * log_pi).sum(-1)
    log_not_pi = (-torch.expm1(log_pi)).clamp_min(torch.finfo(logits.dtype).eps).log()
    contrast = -(counts.dense(counts.rate, logits.shape[-1]) * log_not_pi).sum(-1)
    base = reference[counts.node, counts.option]
    sparse = complement.sparse_target(counts, base, logits.shape[-1], objective.tau)
    return _combine(kl, contrast, complement.complement_floor(counts, sparse, objective.alpha), objective.alpha)


def _combine(kl: Tensor, contrast: Tensor, floor: Tensor, alpha: float) -> NodeLosses:
    return NodeLosses(alpha * kl + (1 - alpha) * contrast, kl.detach(), contrast.detach(), floor)
