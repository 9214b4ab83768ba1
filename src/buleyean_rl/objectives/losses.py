"""The objectives, dense: short, slow, and the reference that `fused` is checked against.

Each loss is

    L = alpha KL(P || pi) + (1 - alpha) C                                                  (2)

with P the complement distribution over some options, pi the model's distribution over them and
a_i = min(v_i, T) / T the share of the rounds that rejected option i. For the token objectives the options are
the vocabulary, at every node of a void boundary:

    published    P on a uniform base;         C = -sum_i a_i log pi_i                      (3)
    complement   P on the frozen base model;  C = -sum_i a_i log(1 - pi_i)                 (4)
    ratio        P on the frozen base model;  C = sum_i a_i max(0, log pi_i - log P_i)^2 / 2   (6)

For `listwise` they are the answers to one prompt, P is on a uniform base, C is (4), and

    pi(y) = softmax over the answers of beta (log pi_model(y) - log pi_base(y))            (5)

(3) is the published loss, kept as it is: its contrast is a cross-entropy *towards* what was rejected.
(4) is unlikelihood (Welleck et al., 2020). (6) regresses a log-probability onto the target's, as IPO does a pair's
(Azar et al., 2024): it pushes a token by 1 - pi where (4) pushes by pi, and stops at P. (5) is the implied reward of
DPO (Rafailov et al., 2023) under the choice model of Plackett and Luce. No trainer is needed to call any of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from buleyean_rl.errors import UsageError
from buleyean_rl.objectives import complement
from buleyean_rl.objectives.complement import Counts

ObjectiveName = Literal["complement", "ratio", "published", "listwise"]


@dataclass(frozen=True)
class Objective:
    """Which loss, and how strong.

    Args:
        name: `complement`, `ratio`, `published` or `listwise`.
        alpha: weight of the KL against the contrast, in (0, 1].
        tau: strength of the complement weights, above 0; 1 is the published formula.
        beta: of equation (5), above 0; only `listwise` has it.
    """

    name: ObjectiveName = "complement"
    alpha: float = 0.7
    tau: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in get_args(ObjectiveName):
            raise UsageError(f"unknown objective {self.name!r}: choose one of {', '.join(get_args(ObjectiveName))}")
        if not 0 < self.alpha <= 1:
            raise UsageError(f"alpha must be above 0 and at most 1, not {self.alpha}")
        if not 0 < self.tau < math.inf:
            raise UsageError(f"tau must be above 0 and finite, not {self.tau}")
        if not 0 < self.beta < math.inf:
            raise UsageError(f"beta must be above 0 and finite, not {self.beta}")

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen base model takes part."""
        return self.name != "published"

    @property
    def of_answers(self) -> bool:
        """Whether the options are whole answers, not tokens."""
        return self.name == "listwise"


class NodeLosses(NamedTuple):
    """What the objective is worth in nats, at each node or, for `listwise`, each record. Every field: (nodes,).

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
    kl = kl_to_target(log_pi, None, counts, objective.tau)
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
    log_not_pi = (-torch.expm1(log_pi)).clamp_min(torch.finfo(logits.dtype).eps).log()
    contrast = -(counts.dense(counts.rate, logits.shape[-1]) * log_not_pi).sum(-1)
    base = reference[counts.node, counts.option]
    sparse = complement.sparse_target(counts, base, logits.shape[-1], objective.tau)
    floor = complement.complement_floor(counts, sparse, objective.alpha)
    return _combine(kl_to_target(log_pi, reference, counts, objective.tau), contrast, floor, objective.alpha)


def ratio_loss(logits: Tensor, reference_logits: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (6). Both parts are 0 at pi = P and nowhere below, so the floor is 0.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        reference_logits: the frozen base model's. Shape: (nodes, vocabulary).
        counts: rejections over the vocabulary at each node.
        objective: alpha and tau.
    """
    log_pi, log_base = logits.log_softmax(-1), reference_logits.detach().log_softmax(-1)
    rejected = counts.node, counts.option
    target = complement.sparse_target(counts, log_base[rejected].exp(), logits.shape[-1], objective.tau)
    log_P = log_base[rejected] + target.ratio.log() - target.normaliser.log()[counts.node]
    contrast = counts.sum_by_node(counts.rate * (log_pi[rejected] - log_P).clamp_min(0).square() / 2)
    kl = kl_to_target(log_pi, log_base.exp(), counts, objective.tau)
    return _combine(kl, contrast, torch.zeros_like(kl).detach(), objective.alpha)


def listwise_loss(log_ratios: Tensor, answers: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (4) over the answers to each prompt, pi by (5).

    Args:
        log_ratios: log pi_model(y) - log pi_base(y). Shape: (answers,).
        answers: the counts of all of them, those at 0 included; a node is a record, of at least two answers.
        objective: alpha, tau and beta.
    """
    record, n = answers.node, answers.sum_by_node(torch.ones_like(answers.count))
    scores = objective.beta * log_ratios
    most = scores.detach().new_full(n.shape, -math.inf).scatter_reduce_(0, record, scores.detach(), "amax")
    log_total = most + answers.sum_by_node((scores - most[record]).exp()).log()
    log_pi = scores - log_total[record]
    P = complement.sparse_target(answers, 1 / n[record], n, objective.tau)
    kl = answers.sum_by_node(torch.xlogy(P.rejected, P.rejected) - P.rejected * log_pi)
    log_not_pi = (-torch.expm1(log_pi)).clamp_min(torch.finfo(log_pi.dtype).eps).log()
    contrast = -answers.sum_by_node(answers.rate * log_not_pi)
    return _combine(kl, contrast, complement.complement_floor(answers, P, objective.alpha), objective.alpha)


def kl_to_target(log_pi: Tensor, base: Tensor | None, counts: Counts, tau: float) -> Tensor:
    """KL(P || pi) at each node. Shape: (nodes,).

    Args:
        log_pi: the model's. Shape: (nodes, vocabulary).
        base: probabilities, the base measure of P; None for a uniform one. Shape: (nodes, vocabulary).
        counts: rejections over the vocabulary at each node.
        tau: strength of the complement weights.
    """
    P = complement.target(counts.dense(counts.count, log_pi.shape[-1]), counts.rounds, base, tau)
    return (torch.xlogy(P, P) - P * log_pi).sum(-1)


def _combine(kl: Tensor, contrast: Tensor, floor: Tensor, alpha: float) -> NodeLosses:
    return NodeLosses(alpha * kl + (1 - alpha) * contrast, kl.detach(), contrast.detach(), floor)
