"""Likelihoods of neutral texts and of rejected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.batching.layout import make_batch
from buleyean_rl.batching.micro_batch import bin_pack, micro_batch_tokens
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.model import Model
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import token_logprobs
from buleyean_rl.objectives.losses import Objective


class Passage(NamedTuple):
    """A text in tokens.

    Args:
        ids: of it, and of what stands before it.
        start: the first that is predicted.
    """

    ids: list[int]
    start: int = 1


def neutral_boundary(encoder: Encoder, text: str | Passage) -> Boundary | None:
    """A text as a boundary; of a plain one all tokens but the first are predicted.

    Args:
        encoder: of the model; so many tokens are used as it allows.
        text: a plain text, or one in tokens.

    Returns:
        The boundary, or None for a text without a token to predict.
    """
    passage = Passage(encoder.encode_text(text)) if isinstance(text, str) else text
    before, ids = passage.ids[: passage.start], passage.ids[passage.start : encoder.max_length]
    if not ids:
        return None
    return merge_responses(before, [(ids, [True] * len(ids))], [1], [1])


@torch.no_grad()
def mean_nll(model: Model, boundaries: Sequence[Boundary]) -> float:
    """Mean negative log-likelihood of rejected tokens, in nats per token, each weighted by its rejection rate.

    Args:
        model: with or without an adapter.
        boundaries: at least one.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in make_micro_batches(model, boundaries, Objective("published")):
        sums += sum_nll(hidden_states(model, batch), model.head, batch.counts)
    nats, weight = sums.tolist()
    return nats / weight


def make_micro_batches(model: Model, boundaries: Sequence[Boundary], objective: Objective) -> list[Batch]:
    """Boundaries in micro-batches on the model's device, in its layout."""
    bins = bin_pack(boundaries, lambda boundary: boundary.size, micro_batch_tokens(model.module))
    return [make_batch(model.layout, members, objective).to(model.device) for members in bins]


def hidden_states(model: Model, batch: Batch) -> Tensor:
    """Last hidden states at a batch's nodes, without dropout. Shape: (nodes, width)."""
    with model.eval_mode():
        return forward_hidden(model.backbone, batch)


def sum_nll(hidden: Tensor, head: OutputHead, counts: Counts) -> Tensor:
    """Sum of the rejected tokens' nats, each times its rejection rate, and sum of the rates. Shape: (2,)."""
    nlls = -token_logprobs(hidden[counts.node], head, counts.option)
    return torch.stack([(nlls * counts.rate).double().sum(), counts.rate.double().sum()]).cpu()
