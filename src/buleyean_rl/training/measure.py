"""What a run is measured on, before training and after: held-out records, neutral texts, drift."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from buleyean_rl import demo_data
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset
from buleyean_rl.training.guard import DriftCheck, Guard
from buleyean_rl.training.held_out import HeldOut

NEUTRAL_TOKENS = 128


class Measurement:
    """The base model and what training makes of it, on the same records and texts.

    Args:
        model: with its adapter.
        dataset: whose held-out records are measured.
        config: the settings.

    Attributes:
        neutral: the bundled plain texts.
    """

    def __init__(self, model: Model, dataset: Dataset, config: BuleyeanConfig) -> None:
        self._model = model
        self._held_out = HeldOut(model, dataset.measured, config.loss)
        self.neutral = neutral_boundaries(model.tokenizer, min(NEUTRAL_TOKENS, config.max_length))

    def before(self, guard: Guard | None) -> dict[str, float]:
        """The objective, and nats of rejected and neutral text; sets the guard's check of the base model.

        What does not depend on the records is measured once for all runs.
        """
        inputs = [*self._model.numerics, [text.prompt + text.tokens for text in self.neutral]]
        if guard is not None:
            base = memoize_to_disk("drift", [*inputs, guard.inputs], lambda: asdict(guard.check_base()))
            guard.base = DriftCheck(**base)
        return self.objective() | memoize_to_disk("neutral", inputs, self.neutral_nll)

    def objective(self) -> dict[str, float]:
        """See `HeldOut.measure`."""
        return self._held_out.measure()

    def neutral_nll(self) -> dict[str, float]:
        """Nats per token of the neutral texts, as `neutral_nll`."""
        return {"neutral_nll": mean_nll(self._model, self.neutral)}


def neutral_boundaries(tokenizer: Any, max_length: int) -> list[Boundary]:
    """The bundled plain texts as boundaries.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens of each, at most.
    """
    boundaries = (neutral_boundary(tokenizer, text, max_length) for text in demo_data.neutral_texts())
    return [boundary for boundary in boundaries if boundary is not None]
