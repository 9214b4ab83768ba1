"""Make a batch in a model's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from buleyean_rl.batching.batch import Batch, collect_answers, pack, pad_paths
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.layout_probe import Layout
from buleyean_rl.objectives.losses import Objective

LAYOUTS: dict[Layout, Callable[[Sequence[Boundary]], Batch]] = {"packed": pack, "padded": pad_paths}


def make_batch(layout: Layout, boundaries: Sequence[Boundary], objective: Objective) -> Batch:
    """Make a batch of boundaries, with the nodes that the objective has a loss at.

    Args:
        layout: the model's, see `Model.layout`.
        boundaries: one per record.
        objective: which loss.
    """
    batch = LAYOUTS[layout](boundaries)
    if objective.is_listwise:
        return replace(batch, answers=collect_answers(boundaries))
    return batch if objective.uses_reference else batch.without_anchors()
