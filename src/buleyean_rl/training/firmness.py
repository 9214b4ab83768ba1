"""How firm a rejection is, where the settings leave it open: tau, the prior of equation (1) and the steps, by the data.

    rejected answers --base--> whose they are --> by how much a rejection divides a token's odds --+
          |                        |              rounds of each answer ---------------------------+--> tau
          +------------------------+--> epochs, learning rate, batch
    rejections of all answers --> share accepted --> m

What a model says itself it says again: only a firm rejection keeps it from that. An answer of another model it would
hardly give, and pushing that is what drifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import Passage
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.models.model import Model
from buleyean_rl.models.views import adapter_disabled
from buleyean_rl.objectives.complement import share_accepted
from buleyean_rl.system.wording import counted
from buleyean_rl.training.config import STEPS, BuleyeanConfig, total_steps
from buleyean_rl.training.dataset import Dataset
from buleyean_rl.training.limits import check_tau

DECIDED = ("tau", "prior_mean", *STEPS)
OWN_DIVISOR = 61.0  # of the odds of a token of the model's own, rejected in all its rounds
SAMPLE, SAMPLE_TOKENS = 32, 128  # records that are looked at, and tokens of each answer
# Of the model's own: passes over few records, until they are so many in all, and steps that go so far in all.
OWN_BATCH, OWN_RECORDS, MAX_OWN_EPOCHS, MAX_OWN_RATE, OWN_PATH = 2, 150, 3.0, 4.5e-4, 0.034
FEW_RECORDS = 8  # fewer pull one way, and get there with smaller steps: those of one record are a third
# A model's own answers at temperatures up to 0.8 have less than this of the nats that it expects of a token, its
# entropy; answers of others have about as many as it expects.
OWN_SHARE = 0.75


class Likelihood(NamedTuple):
    """What a base says of rejected answers, in nats per token.

    Args:
        nats: -log pi(token).
        entropy: what it expects that to be.
    """

    nats: float
    entropy: float


def decide_firmness(model: Model, dataset: Dataset, config: BuleyeanConfig) -> str | None:
    """Set the tau, the prior and the steps of a run where its settings have none.

    Args:
        model: the base, or one with an adapter, which is disabled.
        dataset: of the run.
        config: the settings; its `loss` is set, and what is `DECIDED`.

    Returns:
        What was decided, in a line; None where the settings decide it.

    Raises:
        UsageError: a tau is too large for these records.
    """
    open_tau, open_mean = config.tau is None, config.prior_mean is None
    tau, mean, line = config.tau or 1.0, config.prior_mean or 1.0, None
    if (open_tau or open_mean or config.open_steps) and config.objective == "complement":
        sample = spread(dataset.training, SAMPLE)
        likelihood = Likelihood(*config.processes.once(lambda: [*rejected_likelihood(model, sample)]))
        rounds, is_own = mean_rounds(sample), is_drawn(dataset) or likelihood.nats < OWN_SHARE * likelihood.entropy
        if open_tau:
            tau = own_tau(rounds, config.prior_rounds) if is_own else 1.0
        has_own_steps = is_own and bool(config.open_steps)
        if has_own_steps:
            set_own_steps(config, len(dataset.training))
        if open_mean and is_own:
            mean = accepted_share([*dataset.training, *dataset.anchors])
        divisor = ((rounds + config.prior_rounds) / config.prior_rounds) ** tau
        in_rounds = "1 round" if rounds == 1 else f"{rounds:.3g} rounds"
        whose = "the model's own" if is_own else "answers that the model would not give itself"
        line = (
            f"the rejected answers are {whose} ({likelihood.nats:.2f} nats per token, {likelihood.entropy:.2f} "
            f"expected), judged in {in_rounds}: a rejection divides a token's odds by {divisor:.3g} "
            f"(tau {tau:.3g})"
        )
        line += f"; {mean:.0%} accepted" if open_mean and mean < 1 else ""
        if has_own_steps:
            line += f"; {counted(total_steps(config, len(dataset.training)), 'step')} at {config.learning_rate:.2g}"
    if "per_device_train_batch_size" in config.open_steps:  # what is decided is a step's
        config.per_device_train_batch_size = -(-config.per_device_train_batch_size // config.begun_processes)
    config.tau, config.prior_mean, config.open_steps = tau, mean, []
    config.set_loss()
    check_tau(tau, dataset.training, config.prior_rounds)
    return line


def is_drawn(dataset: Dataset) -> bool:
    """Whether most answers have token ids that were drawn with the model's tokenizer, as those of `mine` have."""
    files = (dataset.training, dataset.held_out, dataset.anchors)
    answers = sum(int(file.rejected_answers.sum() + file.accepted_answers.sum()) for file in files)
    return 2 * dataset.counts.get("drawn_ids", 0) > answers


def own_tau(rounds: float, prior_rounds: float = 1.0) -> float:
    """The tau at which a rejection in all of some rounds divides a token's odds by `OWN_DIVISOR`."""
    return math.log(OWN_DIVISOR) / math.log1p(rounds / prior_rounds)


def set_own_steps(config: BuleyeanConfig, records: int) -> None:
    """Set those steps that nobody set: many records in small ones, fewer in larger ones, a handful in small ones again.

    Args:
        config: the settings.
        records: of the model's own answers, to train on.
    """

    def set_open(name: str, value: float) -> None:
        if name in config.open_steps:
            setattr(config, name, value)

    set_open("per_device_train_batch_size", OWN_BATCH)
    set_open("num_train_epochs", min(max(OWN_RECORDS / records, 1.0), MAX_OWN_EPOCHS))
    max_rate = MAX_OWN_RATE * min(records / FEW_RECORDS, 1.0) ** 0.5
    set_open("learning_rate", min(OWN_PATH / total_steps(config, records), max_rate))


def spread(boundaries: Sequence[Boundary], count: int) -> list[Boundary]:
    """Some of the boundaries, evenly from all of them."""
    step = max(len(boundaries) / count, 1.0)
    return [boundaries[int(i * step)] for i in range(min(count, len(boundaries)))]


def mean_rounds(boundaries: Iterable[Boundary]) -> float:
    """In how many rounds a rejected answer was judged, on average."""
    rounds = [n for boundary in boundaries for n, count in zip(boundary.rounds, boundary.counts, strict=True) if count]
    return sum(rounds) / len(rounds)


def accepted_share(boundaries: Iterable[Boundary]) -> float:
    """See `complement.share_accepted`."""
    pairs = [pair for boundary in boundaries for pair in zip(boundary.counts, boundary.rounds, strict=True)]
    return share_accepted([count for count, _ in pairs], [rounds for _, rounds in pairs])


@torch.no_grad()
def rejected_likelihood(model: Model, boundaries: Sequence[Boundary]) -> Likelihood:
    """What the base says of one rejected answer of each boundary.

    Args:
        model: the base, or one with an adapter, which is disabled.
        boundaries: each with a rejected answer.
    """
    passages = []
    for boundary in boundaries:
        ids = boundary.path_tokens(min(boundary.rejected_ends))[:SAMPLE_TOKENS]
        passages.append(Passage([*boundary.prompt, *ids], len(boundary.prompt)))
    longest = max(len(passage.ids) for passage in passages)
    with adapter_disabled(model.module):
        scores = [score for score in PackedScorer(model, longest).texts(passages) if score is not None]
    tokens = sum(score.tokens for score in scores)
    return Likelihood(*(sum(getattr(s, name) or 0.0 for s in scores) / tokens for name in ("nats", "entropy")))
