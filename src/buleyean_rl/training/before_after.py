"""Measure a run before and after training: held-out records, neutral texts, drift."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from buleyean_rl import demo_data
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset
from buleyean_rl.training.guard import DriftCheck, Guard
from buleyean_rl.training.held_out import HeldOut
from buleyean_rl.training.limits import check_losses

MAX_NEUTRAL_TOKENS = 128


class Measurement:
    """Measures a model before and after training, on the same records and texts.

    Args:
        model: with its adapter.
        dataset: with the held-out records.
        config: the settings.

    Attributes:
        neutral: boundaries of the bundled neutral texts.
    """

    def __init__(self, model: Model, dataset: Dataset, config: BuleyeanConfig) -> None:
        self._model = model
        self._held_out = HeldOut(model, dataset.measured_boundaries, config.loss)
        self.neutral = neutral_boundaries(model.tokenizer, min(MAX_NEUTRAL_TOKENS, config.max_length))

    def before(self, guard: Guard | None) -> dict[str, float]:
        """Measure the base model, and set the guard's check of it.

        Drift and neutral texts do not depend on the records: they are cached for all runs.

        Raises:
            ModelError: a figure is not a number.
        """
        figures = self.objective()
        check_losses(figures, self._model.source.name)
        inputs = [*self._model.numerics_key, [text.prompt + text.tokens for text in self.neutral]]
        if guard is not None:
            base = memoize_to_disk("drift", [*inputs, guard.inputs], lambda: asdict(guard.check_base()))
            guard.base = DriftCheck(**base)
        return figures | memoize_to_disk("neutral", inputs, self.neutral_nll)

    def objective(self) -> dict[str, float]:
        """See `HeldOut.measure`."""
        return self._held_out.measure()

    def neutral_nll(self) -> dict[str, float]:
        """`neutral_nll`: nats per token of the neutral texts."""
        return {"neutral_nll": mean_nll(self._model, self.neutral)}


def neutral_boundaries(tokenizer: Any, max_length: int) -> list[Boundary]:
    """The bundled neutral texts as boundaries.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: maximum tokens of each.
    """
    encoder = Encoder(tokenizer, max_length)
    boundaries = (neutral_boundary(encoder, text) for text in demo_data.neutral_texts())
    return [boundary for boundary in boundaries if boundary is not None]
