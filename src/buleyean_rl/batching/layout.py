"""Make a batch in a model's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from buleyean_rl.batching.batch import Batch, collect_answers, pack, pad_paths
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.layout_probe import Layout
from buleyean_rl.objectives.losses import Objective

LAYOUTS: dict[Layout, Callable[[Sequence[Boundary]], Batch]] = {"packed": pack, "padded": pad_paths}


def make_batch(layout: Layout, boundaries: Sequence[Boundary], objective: Objective) -> Batch:
    """Make a batch of boundaries, with the nodes that the objective has a loss at.

    In the batch's `normaliser` a record counts as one average rejected answer of it, while its losses are summed over
    all of them. So every rejection weighs the same, whatever else its prompt has.

    Args:
        layout: the model's, see `Model.layout`.
        boundaries: one per record.
        objective: which loss.
    """
    batch = LAYOUTS[layout](boundaries)
    if objective.is_listwise:
        return replace(batch, answers=collect_answers(boundaries), normaliser=float(len(boundaries)))
    if objective.uses_reference:
        return replace(batch, normaliser=sum(boundary.terms_per_answer() for boundary in boundaries))
    # as published: the answers of a record were judged in the same rounds
    rounds = [judgement.largest_rounds for boundary in boundaries for judgement in boundary.judgements]
    counts = replace(batch.counts, rounds=torch.tensor(rounds, dtype=batch.counts.rounds.dtype))
    normaliser = sum(boundary.terms_per_answer(rejected_only=True) for boundary in boundaries)
    return replace(batch, counts=counts, normaliser=normaliser).without_anchors()
