"""The objectives, dense: short, slow, and the reference that `fused` is tested against.

Each loss is

    L = alpha KL(P || pi) + (1 - alpha) C                                                  (2)

with P the complement distribution (1) or (1a) over some options, pi the model's distribution over them and
c_i = min(v_i, n_i) / n_i the rejection rate of option i, 0 where n_i = 0:

    complement   options: the vocabulary, at each trie node; P on the reference model;  C by (3)
    listwise     options: the answers to one prompt, pi by (5); P on a uniform base;    C by (3)
    published    options: the vocabulary, at each trie node; P on a uniform base;       C by (4)

    C = sum_i c_i max(0, log pi_i - log P_i)^2 / 2                                         (3)
    C = -sum_i c_i log pi_i                                                                (4)
    pi(y) = softmax over the answers of beta (log pi_model(y) - log pi_reference(y))       (5)

(3) is a one-sided squared log-ratio: it regresses a log-probability onto the target's, as IPO does for a pair (Azar et
al., 2024), and is zero at or below the target. With x_i = dC / d log pi_i, c_i max(0, log pi_i - log P_i) of (3) and
-c_i of (4), the gradient in the logits (of `listwise`: in the scores, beta times the log-ratios) is

    dL/dz_j = alpha (pi_j - P_j) + (1 - alpha) (x_j - pi_j sum_i x_i)                      (6)

(4) is the published contrast, a cross-entropy *towards* the rejected options, kept exactly as published. (5) is the
implied reward of DPO (Rafailov et al., 2023) under the choice model of Plackett and Luce. No trainer is needed to call
any of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from buleyean_rl.errors import UsageError
from buleyean_rl.objectives import complement
from buleyean_rl.objectives.complement import PUBLISHED, Counts, Prior

ObjectiveName = Literal["complement", "listwise", "published"]
DEFAULT_ALPHA: dict[ObjectiveName, float] = {"complement": 0.9, "listwise": 0.7, "published": 0.7}
DEFAULT_MIN_P: dict[ObjectiveName, float] = {"complement": 0.1, "listwise": 0.0, "published": 0.0}
MAX_RISE = 80.0  # nats by which a ratio may raise an option: e^80 is near the largest number of fp32


@dataclass(frozen=True, init=False)
class Objective:
    """Which loss, with its constants.

    Args:
        name: `complement`, `listwise` or `published`.
        alpha: weight of the KL against the contrast, in (0, 1]; None for the objective's `DEFAULT_ALPHA`.
        tau: exponent of the complement ratios, above 0; 1 is the published formula.
        beta: of equation (5), above 0; only `listwise` uses it.
        prior: m and k of the complement ratios.
        min_p: of equation (1a), in [0, 1]; only `complement` uses it. 0: all options take what rejections free, by (1);
            None for the objective's `DEFAULT_MIN_P`.

    Raises:
        UsageError: a value is outside its range, or there is no such objective.
    """

    name: ObjectiveName
    alpha: float
    tau: float
    beta: float
    prior: Prior
    min_p: float

    def __init__(
        self,
        name: ObjectiveName = "complement",
        alpha: float | None = None,
        tau: float = 1.0,
        beta: float = 0.1,
        prior: Prior = PUBLISHED,
        min_p: float | None = None,
    ) -> None:
        if name == "ratio":
            raise UsageError("objective 'ratio' is called 'complement' now: write complement")
        if name not in get_args(ObjectiveName):
            raise UsageError(f"unknown objective {name!r}: choose one of {', '.join(get_args(ObjectiveName))}")
        alpha = DEFAULT_ALPHA[name] if alpha is None else alpha
        min_p = DEFAULT_MIN_P[name] if min_p is None else min_p
        if not 0 < alpha <= 1:
            raise UsageError(f"alpha must be above 0 and at most 1, not {alpha}")
        if not 0 < tau < math.inf:
            raise UsageError(f"tau must be above 0 and finite, not {tau}")
        if not 0 < beta < math.inf:
            raise UsageError(f"beta must be above 0 and finite, not {beta}")
        if not prior.capped and -math.log(prior.mean) * tau > MAX_RISE:
            raise UsageError(
                f"tau {tau:g} is too large for a prior mean of {prior.mean:g}: lower tau or raise the mean"
            )
        if not 0 <= min_p <= 1:
            raise UsageError(f"min_p must be at least 0 and at most 1, not {min_p}")
        if min_p and name != "complement":
            raise UsageError(f"min_p is about a reference model over tokens: leave it out with {name}")
        vars(self).update(  # frozen: no assignment
            name=name, alpha=alpha, tau=tau, beta=beta, prior=prior, min_p=min_p
        )

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen base model takes part."""
        return self.name != "published"

    @property
    def is_listwise(self) -> bool:
        """Whether the options are whole answers, not tokens."""
        return self.name == "listwise"


class NodeLosses(NamedTuple):
    """The objective in nats, at each node or, for `listwise`, each record. Every field: (nodes,).

    Args:
        loss: L, differentiable.
        kl: KL(P || pi), detached.
        contrast: C, detached.
        floor: the irreducible loss, the least L of any distribution, detached.
    """

    loss: Tensor
    kl: Tensor
    contrast: Tensor
    floor: Tensor


def complement_loss(logits: Tensor, reference_logits: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (3), P on the reference model.

    Both terms are 0 at pi = P and never negative, so the floor is 0.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        reference_logits: the reference model's. Shape: (nodes, vocabulary).
        counts: over the vocabulary at each node.
        objective: which target.
    """
    log_pi, log_base = logits.log_softmax(-1), reference_logits.detach().log_softmax(-1)
    v, n = (counts.dense(column, logits.shape[-1]) for column in (counts.count, counts.rounds))
    ratio, normaliser = complement.tilt(v, n, log_base.exp(), objective.tau, objective.prior, objective.min_p)
    entries = counts.node, counts.option
    log_P = (log_base + ratio.log() - normaliser.log())[entries]  # (1)
    contrast = counts.sum_by_node(counts.rate * (log_pi[entries] - log_P).clamp_min(0).square() / 2)  # (3)
    kl = kl_to_target(log_pi, log_base.exp(), counts, objective)
    return _combine(kl, contrast, torch.zeros_like(kl).detach(), objective.alpha)


def listwise_loss(log_ratios: Tensor, answers: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (3) over the answers to each prompt, pi by (5), P on a uniform base; the floor is 0.

    Args:
        log_ratios: log pi_model(y) - log pi_reference(y). Shape: (answers,).
        answers: the counts of every answer, zeros included; a node is a record, of at least two answers.
        objective: which target, and beta.
    """
    record, n = answers.node, answers.sum_by_node(torch.ones_like(answers.count))
    scores = objective.beta * log_ratios
    highest = scores.detach().new_full(n.shape, -math.inf).scatter_reduce_(0, record, scores.detach(), "amax")
    log_total = highest + answers.sum_by_node((scores - highest[record]).exp()).log()
    log_pi = scores - log_total[record]  # (5)
    P = complement.sparse_target(answers, 1 / n[record], n, objective.tau, objective.prior)
    log_P = P.ratio.log() - (n * P.normaliser).log()[record]  # (1)
    kl = answers.sum_by_node(torch.xlogy(P.listed, P.listed) - P.listed * log_pi)
    contrast = answers.sum_by_node(answers.rate * (log_pi - log_P).clamp_min(0).square() / 2)  # (3)
    return _combine(kl, contrast, torch.zeros_like(kl).detach(), objective.alpha)


def published_loss(logits: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """Equation (2) with contrast (4), P on a uniform base.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        counts: over the vocabulary at each node.
        objective: which target.
    """
    log_pi = logits.log_softmax(-1)
    kl = kl_to_target(log_pi, None, counts, objective)
    contrast = -(counts.dense(counts.rate, logits.shape[-1]) * log_pi).sum(-1)  # (4)
    floor = complement.published_floor(counts, logits.shape[-1], objective.alpha, objective.tau, objective.prior)
    return _combine(kl, contrast, floor, objective.alpha)


def kl_to_target(log_pi: Tensor, base: Tensor | None, counts: Counts, objective: Objective) -> Tensor:
    """KL(P || pi) at each node. Shape: (nodes,).

    Args:
        log_pi: the model's. Shape: (nodes, vocabulary).
        base: the base measure of P, probabilities; None for a uniform one. Shape: (nodes, vocabulary).
        counts: over the vocabulary at each node.
        objective: which target.
    """
    v, n = (counts.dense(column, log_pi.shape[-1]) for column in (counts.count, counts.rounds))
    P = complement.target(v, n, base, objective.tau, objective.prior, objective.min_p)
    return (torch.xlogy(P, P) - P * log_pi).sum(-1)


def _combine(kl: Tensor, contrast: Tensor, floor: Tensor, alpha: float) -> NodeLosses:
    return NodeLosses(alpha * kl + (1 - alpha) * contrast, kl.detach(), contrast.detach(), floor)  # (2)
