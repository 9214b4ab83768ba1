"""The losses over full logits, and random inputs of them and of the fused ones."""

from __future__ import annotations

import torch
from torch import Tensor

from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts, Prior
from buleyean_rl.objectives.losses import NodeLosses, Objective, complement_loss, published_loss

OBJECTIVES = [
    Objective("complement", min_p=0.0),
    Objective("published"),
    Objective("complement", alpha=0.3, tau=0.1, min_p=0.0),
    Objective("published", alpha=1.0, tau=0.5),
    Objective("complement", prior=Prior(0.4, 3.0), min_p=0.0),
    Objective("complement", prior=Prior(0.4)),
    Objective("published", prior=Prior(0.4)),
]


def random_counts(nodes: int, vocabulary: int, entries: int, rounds: int = 10) -> Counts:
    """Up to `entries` judged tokens per node, some nodes with none, counts of 0 and beyond T included."""
    rows = []
    for node in range(nodes):
        for token in torch.randperm(vocabulary)[: torch.randint(0, entries + 1, ()).item()].tolist():
            rows.append((node, token, torch.randint(0, rounds + 3, ()).item()))
    node, option, count = (
        (torch.tensor(column) for column in zip(*rows, strict=True))
        if rows
        else (torch.zeros(0, dtype=torch.long),) * 3
    )
    return Counts(node, option, count.float(), torch.full((len(rows),), float(rounds)), nodes)


def dense_loss(
    hidden: Tensor, head: OutputHead, counts: Counts, objective: Objective, reference: Tensor | None
) -> NodeLosses:
    logits = head(hidden)
    counts = counts.astype(logits.dtype)
    if reference is None:
        return published_loss(logits, counts, objective)
    return complement_loss(logits, head(reference), counts, objective)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, objective: Objective, **head: object
) -> tuple[Tensor, OutputHead, Counts, Tensor | None]:
    nodes, width, vocabulary = shape
    hidden = torch.randn(nodes, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    reference = (hidden + torch.randn(nodes, width) / 4).to(dtype) if objective.uses_reference else None
    return hidden, OutputHead(weight, **head), random_counts(nodes, vocabulary, 3), reference  # type: ignore[arg-type]
