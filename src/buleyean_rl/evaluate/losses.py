"""Likelihoods of texts and rejections, and the objective over some boundaries: what training measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from buleyean_rl.boundary import Boundary, merge_responses
from buleyean_rl.losses import NodeLosses, Objective
from buleyean_rl.models import evaluating, output_head, plain_model
from buleyean_rl.trainer import batch_losses, choose_layout, make_batch


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


def mean_nll(model: Any, boundaries: Sequence[Boundary], batch_size: int = 4) -> float:
    """Mean negative log-likelihood of what was rejected, in nats per token, each weighted by its rate.

    Args:
        model: PEFT or plain.
        boundaries: at least one; of plain texts, this is their nats per token.
        batch_size: boundaries in one forward pass.
    """
    total, weight = 0.0, 0.0
    # the contrast of the published objective is this very likelihood
    for losses, rate in _losses(model, boundaries, Objective("published"), batch_size):
        total += losses.contrast.sum().item()
        weight += rate
    return total / weight


def mean_losses(
    model: Any, boundaries: Sequence[Boundary], objective: Objective, batch_size: int = 4
) -> dict[str, float]:
    """The objective over some boundaries, dropout off: means of loss, kl, contrast and floor per node.

    Args:
        model: a PEFT model.
        boundaries: at least one.
        objective: which loss.
        batch_size: boundaries in one forward pass.
    """
    sums, nodes = torch.zeros(4, dtype=torch.float64), 0
    for losses, _ in _losses(model, boundaries, objective, batch_size):
        sums += torch.stack([part.double().sum().cpu() for part in losses])
        nodes += len(losses.loss)
    return dict(zip(NodeLosses._fields, (sums / nodes).tolist(), strict=True))


def _losses(
    model: Any, boundaries: Sequence[Boundary], objective: Objective, batch_size: int
) -> Iterator[tuple[NodeLosses, float]]:
    layout, head = choose_layout(model), output_head(model)
    for start in range(0, len(boundaries), batch_size):
        batch = make_batch(layout, boundaries[start : start + batch_size], objective).to(plain_model(model).device)
        with evaluating(model), torch.no_grad():
            losses = batch_losses(model, head, batch, objective)
        yield losses, batch.counts.rate.sum().item()
