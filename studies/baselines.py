"""What others do with rejected answers, each loss from likelihoods or logits alone: for comparison, not for use.

With r = log pi_model(y) - log pi_base(y), both summed over the rejected tokens of y, and |y| their number:

    ascent          log pi(y) / |y|                                             gradient ascent on the likelihood
    unlikelihood    -log(1 - pi(y_t)), mean over tokens                         Welleck et al. 2020, eq. 4
    npo             -(2 / beta) log sigmoid(-beta r)                            Zhang et al. 2024, eq. 3
    simnpo          -(2 / beta) log sigmoid(-beta log pi(y) / |y| - margin)     Fan et al., 2410.07163
    kto             1 - sigmoid(beta (z - r)), no desirable answers             Ethayarajh et al. 2024, eq. 8
    pmpo            log pi(y) / |y| + beta KL(base || pi) at the answer         Abdolmaleki et al., 2410.04166
    ftpo            own alternatives above the first rejected token by a        Paech et al., 2510.15061
                    margin in logits; all logits held near the base's
    dpo             -log sigmoid(beta (r_chosen - r_rejected))                  Rafailov et al. 2023, eq. 7
    sft             -log pi(chosen), per token                                  the plain alternative

Two are the package's KL(P || pi), without its contrast and min-p (`kin_settings`):

    undial          P: the base, gamma off a rejected token's logit             Dong et al., 2402.10052
    tnt             P: the base without the rejected token, forward KL          Zhang et al., 2406.13660

`pmpo` is its half for rejected answers. `dpo` and `sft` see chosen ones too: one is the ceiling, the other the habit.
In `kto`, z estimates KL(pi || base) from the answers of the batch under each other's prompts, not below 0, no gradient,
as TRL and the paper do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

BASELINES = ("ascent", "unlikelihood", "npo", "simnpo", "kto", "pmpo", "ftpo", "dpo", "sft")
NEEDS_CHOSEN = ("dpo", "sft")
NEEDS_BASE = ("npo", "kto", "pmpo", "ftpo", "dpo")
HAVE_BETA = ("npo", "simnpo", "kto", "pmpo", "dpo")
KIN = ("undial", "tnt")
BANNED = 30.0  # nats off a logit, after which a token is as good as removed

# As its authors' trainer has them: margin of the logits; weights of the squares, and what the judged tokens' logits may
# move at no cost; alternatives, and their least share of the likeliest one.
FTPO_MARGIN, FTPO_OTHERS, FTPO_JUDGED, FTPO_FREE = 2.0, 0.4, 0.05, 1.0
FTPO_ALTERNATIVES, FTPO_MIN_P = 20, 0.05


@dataclass(frozen=True)
class Baseline:
    """Which loss, and how strong.

    Args:
        name: of `BASELINES`.
        beta: for those that have one.
        margin: for `simnpo`.
        anchor: weight of KL(base || pi) where nothing was rejected: in the answers, and at a trainer's anchors.
    """

    name: str
    beta: float = 0.1
    margin: float = 0.0
    anchor: float = 0.0

    @property
    def uses_base(self) -> bool:
        """Whether it compares with the base model."""
        return self.name in NEEDS_BASE or self.anchor > 0


class Scores(NamedTuple):
    """The likelihoods of some answers, all but the tokens of an answer that were not rejected. In nats.

    Args:
        tokens: log pi of each token, answer after answer. Shape: (entries,).
        answer: which answer each of them belongs to. Shape: (entries,).
        policy: log pi of each answer. Shape: (answers,).
        base: log pi_base of each answer. Shape: (answers,).
    """

    tokens: Tensor
    answer: Tensor
    policy: Tensor
    base: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Mean of per-token values over each answer. Shape: (entries,) to (answers,)."""
        sums, ones = torch.zeros_like(self.policy), torch.ones_like(values)
        return sums.index_add(0, self.answer, values) / sums.index_add(0, self.answer, ones).clamp_min(1)


def ascent(rejected: Scores) -> Tensor:
    """Mean log-likelihood of each answer's tokens. Shape: (answers,)."""
    return rejected.mean(rejected.tokens)


def unlikelihood(rejected: Scores) -> Tensor:
    """Mean unlikelihood of each answer's tokens. Shape: (answers,)."""
    not_pi = (-torch.expm1(rejected.tokens)).clamp_min(torch.finfo(rejected.tokens.dtype).eps)
    return rejected.mean(-not_pi.log())


def npo(rejected: Scores, beta: float) -> Tensor:
    """Negative preference optimisation. Shape: (answers,)."""
    return -2 / beta * logsigmoid(-beta * (rejected.policy - rejected.base))


def simnpo(rejected: Scores, beta: float, margin: float) -> Tensor:
    """The same without a base, per token. Shape: (answers,)."""
    return -2 / beta * logsigmoid(-beta * rejected.mean(rejected.tokens) - margin)


def kto(rejected: Scores, divergence: Tensor, beta: float) -> Tensor:
    """Kahneman-Tversky optimisation of undesirable answers alone. `divergence` is z, a scalar. Shape: (answers,)."""
    return 1 - torch.sigmoid(beta * (divergence - (rejected.policy - rejected.base)))


def ftpo(logits: Tensor, base: Tensor, rejected: Tensor) -> Tensor:
    """Final-token preference optimisation, at the first rejected token of each answer.

    Each of the base's alternatives within min-p is pulled to a margin above the rejected token, the less the nearer it
    is; the logits of the other tokens are held by the square of how far they moved, those of judged tokens from a
    nat on.

    Args:
        logits: the model's there. Shape: (answers, vocabulary).
        base: the base's. Shape: (answers, vocabulary).
        rejected: the token. Shape: (answers,).

    Returns:
        Shape: (answers,).
    """
    column = rejected.unsqueeze(1)
    plausible = base.scatter(1, column, -math.inf)
    best = plausible.topk(min(FTPO_ALTERNATIVES, plausible.shape[1] - 1))
    taken = best.values >= best.values[:, :1] + math.log(FTPO_MIN_P)
    gap = FTPO_MARGIN - (logits.gather(1, best.indices) - logits.gather(1, column))
    weight = (gap.detach() / FTPO_MARGIN).clamp(0, 1) * taken
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, taken.to(weight))  # all are above the margin
    preference = (softplus(gap) * weight).sum(1) / weight.sum(1)
    judged = torch.zeros_like(logits).scatter(1, best.indices, taken.to(logits)).scatter(1, column, 1.0)
    moved = logits - base
    others = (moved.square() * (1 - judged)).sum(1) / (1 - judged).sum(1)
    excess = ((moved.abs() - FTPO_FREE).clamp_min(0).square() * judged).sum(1) / judged.sum(1)
    return preference + FTPO_OTHERS * others + FTPO_JUDGED * excess


def dpo(chosen: Scores, rejected: Scores, beta: float) -> Tensor:
    """Direct preference optimisation. Shape: (pairs,)."""
    return -logsigmoid(beta * ((chosen.policy - chosen.base) - (rejected.policy - rejected.base)))


def sft(chosen: Scores) -> Tensor:
    """Mean negative log-likelihood of each answer's tokens. Shape: (answers,)."""
    return -chosen.mean(chosen.tokens)


def kin_settings(name: str, gamma: float = BANNED) -> dict[str, Any]:
    """The package's settings that are another's method.

    Args:
        name: of `KIN`.
        gamma: of `undial`: nats off a rejected token's logit. A rejection in one of one rounds divides the odds by 2,
            to the power of tau.
    """
    gamma = gamma if name == "undial" else BANNED
    return {"objective": "complement", "alpha": 1.0, "min_p": 0.0, "tau": gamma / math.log(2)}
