"""Likelihoods of neutral texts and of rejected tokens."""

from __future__ import annotations

from collections.abc import Sequence

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


def neutral_boundary(encoder: Encoder, text: str) -> Boundary | None:
    """A plain text as a boundary, all of whose tokens but the first are predicted.

    Args:
        encoder: of the model; so many tokens are used as it allows.
        text: a plain text.

    Returns:
        The boundary, or None for a text of fewer than two tokens.
    """
    ids = encoder.encode_text(text)
    if len(ids) < 2:
        return None
    return merge_responses(ids[:1], [(ids[1:], [True] * (len(ids) - 1))], [1], 1)


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
