"""What others do with rejected answers, behind the same trainer: for comparison, not for use.

With r = log pi_model(y) - log pi_base(y), both summed over the rejected tokens of y:

    ascent          log pi(y), per token                                      gradient ascent on the likelihood
    unlikelihood    -log(1 - pi(y_t)), per token                              Welleck et al. 2020, eq. 4
    npo             -(2 / beta) log sigmoid(-beta r)                          Zhang et al. 2024, eq. 3
    kto             1 - sigmoid(beta (z - r)), no desirable answers           Ethayarajh et al. 2024, eq. 8
    dpo             -log sigmoid(beta (r_chosen - r_rejected))                Rafailov et al. 2023, eq. 7
    sft             -log pi(chosen), per token                                the plain alternative

`dpo` and `sft` see the chosen answers: one is the ceiling, the other the habit. In `kto`, z estimates KL(pi || base)
from the answers of the batch under each other's prompts, not below 0, no gradient, as TRL and the paper do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from buleyean_rl.batching.batch import Batch, collect_answers
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.views import backbone
from buleyean_rl.objectives.fused import token_logprobs
from buleyean_rl.objectives.losses import NodeLosses
from buleyean_rl.training.trainer import BuleyeanTrainer

BASELINES = ("ascent", "unlikelihood", "npo", "kto", "dpo", "sft")
NEEDS_CHOSEN = ("dpo", "sft")
NEEDS_BASE = ("npo", "kto", "dpo")


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


def ascent(rejected: Scores) -> Tensor:
    """Mean log-likelihood of each answer's tokens. Shape: (answers,)."""
    return _mean(rejected, rejected.tokens)


def unlikelihood(rejected: Scores) -> Tensor:
    """Mean unlikelihood of each answer's tokens. Shape: (answers,)."""
    not_pi = (-torch.expm1(rejected.tokens)).clamp_min(torch.finfo(rejected.tokens.dtype).eps)
    return _mean(rejected, -not_pi.log())


def npo(rejected: Scores, beta: float) -> Tensor:
    """Negative preference optimisation. Shape: (answers,)."""
    return -2 / beta * logsigmoid(-beta * (rejected.policy - rejected.base))


def kto(rejected: Scores, divergence: Tensor, beta: float) -> Tensor:
    """Kahneman-Tversky optimisation of undesirable answers alone. `divergence` is z, a scalar. Shape: (answers,)."""
    return 1 - torch.sigmoid(beta * (divergence - (rejected.policy - rejected.base)))


def dpo(chosen: Scores, rejected: Scores, beta: float) -> Tensor:
    """Direct preference optimisation. Shape: (pairs,)."""
    return -logsigmoid(beta * ((chosen.policy - chosen.base) - (rejected.policy - rejected.base)))


def sft(chosen: Scores) -> Tensor:
    """Mean negative log-likelihood of each answer's tokens. Shape: (answers,)."""
    return -_mean(chosen, chosen.tokens)


def _mean(scores: Scores, values: Tensor) -> Tensor:
    """Mean of per-token values over each answer. Shape: (entries,) to (answers,)."""
    sums, ones = torch.zeros_like(scores.policy), torch.ones_like(values)
    return sums.index_add(0, scores.answer, values) / sums.index_add(0, scores.answer, ones).clamp_min(1)


@dataclass(frozen=True)
class Baseline:
    """Which of them, and how strong.

    Args:
        name: of a function above.
        beta: for `npo`, `kto` and `dpo`.
    """

    name: str
    beta: float = 0.1


class BaselineTrainer(BuleyeanTrainer):
    """The package's trainer with another loss.

    Args:
        baseline: which.
        arguments: as for `BuleyeanTrainer`; for `dpo` and `sft`, answers at count 0 are the chosen ones.
    """

    def __init__(self, baseline: Baseline, *arguments: Any, **options: Any) -> None:
        self.baseline = baseline
        self._divergence: Tensor | None = None
        super().__init__(*arguments, **options)

    def collate(self, numbered: Sequence[tuple[int, Boundary]]) -> dict[str, Any]:
        """Rows with the answers in them; for `kto` also the answers under each other's prompts."""
        inputs: dict[str, Any] = super().collate(numbered)
        boundaries = dict(numbered)
        inputs["batches"] = [
            replace(
                batch,
                answers=collect_answers([boundaries[number] for number in batch.numbers]),
                weights=None,  # a loss is a record's
                normaliser=float(len(batch.numbers)),
            )
            for batch in inputs["batches"]
        ]
        if self.baseline.name == "kto":
            own = [boundary for _, boundary in numbered]
            swapped = [replace(a, prompt=b.prompt) for a, b in zip(own, own[1:] + own[:1], strict=True)]
            inputs["mismatched"] = replace(LAYOUTS[self.layout](swapped), answers=collect_answers(swapped))
        return inputs

    @property
    def uses_reference(self) -> bool:
        """See `BuleyeanTrainer.uses_reference`."""
        return self.baseline.name in NEEDS_BASE

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the package's, after z where there is one."""
        if "mismatched" in inputs:
            batch = inputs["mismatched"].to(self.args.device)
            with torch.no_grad():
                model.eval()
                hidden, base = forward_hidden(backbone(model), batch), reference_hidden(model, batch)
                model.train()
                scores = self._scores(hidden, base, batch, lambda answers: torch.ones_like(answers.rejected))
            self._divergence = (scores.policy - scores.base).mean().clamp_min(0)
        return super().training_step(model, inputs, num_items_in_batch)

    def losses(self, batch: Batch) -> NodeLosses:
        """The baseline's loss of each record; it has no parts and no floor."""
        name, beta = self.baseline.name, self.baseline.beta
        hidden = forward_hidden(self.language_model.backbone, batch)
        base = hidden.detach() if batch.reference is None else batch.reference
        rejected = self._scores(hidden, base, batch, lambda answers: answers.rejected)
        if name in NEEDS_CHOSEN:
            counts = batch.answers.counts  # type: ignore[union-attr]
            chosen = self._scores(hidden, base, batch, lambda answers: torch.ones_like(answers.rejected))
            liked, disliked = counts.count == 0, counts.count > 0
            pairs = _select(chosen, liked), _select(rejected, disliked)
            loss = sft(chosen)[liked] if name == "sft" else dpo(*pairs, beta)
        else:
            loss = {
                "ascent": lambda: ascent(rejected),
                "unlikelihood": lambda: unlikelihood(rejected),
                "npo": lambda: npo(rejected, beta),
                "kto": lambda: kto(rejected, self._divergence, beta),  # type: ignore[arg-type]
            }[name]()
        return NodeLosses(loss, *(torch.zeros_like(loss) for _ in range(3)))

    def _scores(self, hidden: Tensor, base: Tensor, batch: Batch, token_mask: Callable[[Any], Tensor]) -> Scores:
        answers = batch.answers
        assert answers is not None
        mask = token_mask(answers)
        policy = token_logprobs(hidden[answers.parent], self.head, answers.token)[answers.token_index[mask]]
        frozen = token_logprobs(base[answers.parent], self.head, answers.token)[answers.token_index[mask]]
        answer, zeros = answers.answer_index[mask], policy.new_zeros(len(answers.counts.node))
        return Scores(policy, answer, zeros.index_add(0, answer, policy), zeros.index_add(0, answer, frozen))


def _select(scores: Scores, which: Tensor) -> Scores:
    """The sums of some answers; `tokens` and `answer` stay those of all."""
    return scores._replace(policy=scores.policy[which], base=scores.base[which])
