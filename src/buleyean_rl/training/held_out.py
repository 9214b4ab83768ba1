"""The objective on held-out records, before training and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from buleyean_rl.batching.forward import add_references, losses_from_states
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import hidden_states, make_micro_batches, sum_nll
from buleyean_rl.models.model import Model
from buleyean_rl.objectives.losses import NodeLosses, Objective


class HeldOut:
    """The boundaries that a run is measured on, before and after, without dropout; their reference is computed once.

    Args:
        model: with an adapter.
        boundaries: at least one.
        objective: which loss.
    """

    def __init__(self, model: Model, boundaries: Sequence[Boundary], objective: Objective) -> None:
        self._model, self._objective = model, objective
        self.tokens = sum(boundary.size for boundary in boundaries)
        self._batches = make_micro_batches(model, boundaries, objective)
        self._has_references = not objective.uses_reference

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means of `loss`, `kl`, `contrast`, `floor` per node; `rejected_nll`, as by `mean_nll`, if any is rejected."""
        sums, nlls, terms = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0
        if not self._has_references:
            self._batches, self._has_references = add_references(self._model.module, self._batches), True
        for batch in self._batches:
            hidden = hidden_states(self._model, batch)
            losses = losses_from_states(hidden, self._model.head, batch, self._objective)
            sums += torch.stack([part.double().sum().cpu() for part in losses])
            nlls += sum_nll(hidden, self._model.head, batch.counts)
            terms += batch.terms
        means = dict(zip(NodeLosses._fields, (sums / terms).tolist(), strict=True))
        return means | ({"rejected_nll": (nlls[0] / nlls[1]).item()} if nlls[1] > 0 else {})
