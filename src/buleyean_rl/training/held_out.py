"""The objective on held-out records, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from buleyean_rl.batching.forward import add_references, losses_of_states
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import _batches, _nll, _states
from buleyean_rl.models.views import output_head
from buleyean_rl.objectives.losses import NodeLosses, Objective


class HeldOut:
    """Boundaries that a run is measured on, dropout off, before it and after: the base model's states are kept.

    Args:
        model: a PEFT model.
        boundaries: at least one.
        objective: which loss.
    """

    def __init__(self, model: Any, boundaries: Sequence[Boundary], objective: Objective) -> None:
        self._model, self._objective, self._head = model, objective, output_head(model)
        self._rows = _batches(model, boundaries, objective)
        if objective.uses_reference:
            self._rows = add_references(model, self._rows)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means of `loss`, `kl`, `contrast` and `floor` per node, and `rejected_nll` as by `mean_nll`."""
        sums, nlls, terms = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0
        for batch in self._rows:
            hidden = _states(self._model, batch)
            losses = losses_of_states(hidden, self._head, batch, self._objective)
            sums += torch.stack([part.double().sum().cpu() for part in losses])
            nlls += _nll(hidden, self._head, batch.counts)
            terms += batch.terms
        means = dict(zip(NodeLosses._fields, (sums / terms).tolist(), strict=True))
        return means | {"rejected_nll": (nlls[0] / nlls[1]).item()}
