"""Likelihoods of texts and rejections, and the objective over some boundaries: what training measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.batching.layout import choose_layout, make_batch
from buleyean_rl.batching.rows import bin_pack, micro_batch_tokens
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.views import backbone, eval_mode, output_head, plain_model
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import token_logprobs
from buleyean_rl.objectives.losses import Objective


def neutral_boundary(tokenizer: Any, text: str, max_length: int) -> Boundary | None:
    """A plain text in the shape of a boundary, each of its tokens but the first to be predicted.

    Args:
        tokenizer: a transformers tokenizer.
        text: any.
        max_length: most tokens to use.

    Returns:
        The boundary, or None for a text of fewer than two tokens.
    """
    ids = list(tokenizer(text).input_ids)[:max_length]
    if len(ids) < 2:
        return None
    return merge_responses(ids[:1], [(ids[1:], [True] * (len(ids) - 1))], [1], 1)


@torch.no_grad()
def mean_nll(model: Any, boundaries: Sequence[Boundary]) -> float:
    """Mean negative log-likelihood of what was rejected, in nats per token, each weighted by its rate.

    Args:
        model: PEFT or plain.
        boundaries: at least one; of plain texts, this is their nats per token.
    """
    head, sums = output_head(model), torch.zeros(2, dtype=torch.float64)
    for batch in _batches(model, boundaries, Objective("published")):
        sums += _nll(_states(model, batch), head, batch.counts)
    nats, weight = sums.tolist()
    return nats / weight


def _batches(model: Any, boundaries: Sequence[Boundary], objective: Objective) -> list[Batch]:
    layout, device = choose_layout(model), plain_model(model).device
    rows = bin_pack(boundaries, lambda boundary: boundary.size, micro_batch_tokens(model))
    return [make_batch(layout, row, objective).to(device) for row in rows]


def _states(model: Any, batch: Batch) -> Tensor:
    with eval_mode(model):
        return forward_hidden(backbone(model), batch)


def _nll(hidden: Tensor, head: OutputHead, counts: Counts) -> Tensor:
    """Nats of what was rejected, each times its rate, and the sum of the rates. Shape: (2,)."""
    nlls = -token_logprobs(hidden[counts.node], head, counts.option)
    return torch.stack([(nlls * counts.rate).double().sum(), counts.rate.double().sum()]).cpu()
