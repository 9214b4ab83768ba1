"""Make a batch in a model's layout, and weigh its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from buleyean_rl.batching.batch import Batch, collect_answers, pack, pad_paths
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.layout_probe import Layout
from buleyean_rl.objectives.losses import Objective

LAYOUTS: dict[Layout, Callable[[Sequence[Boundary]], Batch]] = {"packed": pack, "padded": pad_paths}


ANCHOR_SHARE = 1.0  # weight of all anchors together, of all rejected answers' together


def make_batch(
    layout: Layout, boundaries: Sequence[Boundary], objective: Objective, anchor_weight: float = ANCHOR_SHARE
) -> Batch:
    """Make a batch of boundaries, with the nodes that the objective has a loss at.

    On the vocabulary with a reference the loss of a step is a sum over answers of their nodes' mean loss, over the
    number of records that reject something. So every rejected answer weighs the same, whatever its length and whatever
    else its prompt has, and all anchors together have a fixed share, however many they are. Of `published`, a record
    counts as one average rejected answer of it in the `normaliser`, while its losses are summed over all of them.

    Args:
        layout: the model's, see `Model.layout`.
        boundaries: one per record.
        objective: which loss.
        anchor_weight: of an accepted answer; a rejected one has 1.
    """
    batch = LAYOUTS[layout](boundaries)
    if objective.is_listwise:
        return replace(batch, answers=collect_answers(boundaries), normaliser=float(len(boundaries)))
    if objective.uses_reference:
        weights = [weight for boundary in boundaries for weight in boundary.node_weights(anchor_weight)]
        rejecting = sum(boundary.rejected_answers > 0 for boundary in boundaries)
        return replace(batch, weights=torch.tensor(weights), normaliser=float(rejecting))
    # as published: the answers of a record were judged in the same rounds
    rounds = [judgement.largest_rounds for boundary in boundaries for judgement in boundary.judgements]
    counts = replace(batch.counts, rounds=torch.tensor(rounds, dtype=batch.counts.rounds.dtype))
    normaliser = sum(boundary.rejected_terms_per_answer() for boundary in boundaries)
    return replace(batch, counts=counts, normaliser=normaliser).without_anchors()
