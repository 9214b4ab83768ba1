"""Measure a run: held-out records before and after training, and its drift."""

from __future__ import annotations

from typing import Any

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.drift import Drifts, as_drifts, as_json, drift_texts, measure_drift
from buleyean_rl.evaluation.neutral_text import Passage, neutral_boundary
from buleyean_rl.evaluation.scoring import Text
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset
from buleyean_rl.training.guard import DriftCheck, Guard
from buleyean_rl.training.held_out import HeldOut
from buleyean_rl.training.limits import check_losses
from buleyean_rl.training.processes import Processes

MAX_NEUTRAL_TOKENS = 128


class Measurement:
    """Measures a model before and after training, on the same records and texts.

    Args:
        model: with its adapter.
        dataset: with the held-out records.
        config: the settings.

    Attributes:
        texts: boundaries of the texts that drift is measured on, by kind.
    """

    def __init__(self, model: Model, dataset: Dataset, config: BuleyeanConfig) -> None:
        self._model = model
        self._held_out = HeldOut(model, dataset.measured_boundaries, config.loss)
        self._max_tokens = min(MAX_NEUTRAL_TOKENS, config.max_length)
        self._processes = config.processes
        self.texts = text_boundaries(model, self._max_tokens, self._processes)

    @property
    def tokens(self) -> int:
        """Tokens that measuring the trained model reads, those of plain texts with the base and without."""
        texts = sum(text.size for members in self.texts.values() for text in members)
        return self._held_out.tokens + 2 * texts

    def before(self, guard: Guard | None) -> dict[str, float]:
        """Measure the base model, and set the guard's check of it.

        The guard's check does not depend on the records: it is cached for all runs.

        Raises:
            ModelError: a figure is not a number.
        """
        figures = self.objective()
        check_losses(figures, self._model.source.name)
        if guard is not None:
            texts = [text.prompt + text.tokens for kind in self.texts.values() for text in kind]
            inputs = [*self._model.numerics_key, texts, guard.inputs]
            check = self._processes.once(lambda: memoize_to_disk("drift", inputs, lambda: guard.check_base().as_json()))
            guard.base = DriftCheck.from_json(check)
        return figures

    def objective(self) -> dict[str, float]:
        """See `HeldOut.measure`."""
        return self._processes.once(self._held_out.measure)

    def drift(self) -> Drifts:
        """What training did to the texts, by kind."""
        return as_drifts(self._processes.once(lambda: as_json(measure_drift(self._model, self._max_tokens))))


def text_boundaries(model: Model, max_length: int, processes: Processes) -> dict[str, list[Boundary]]:
    """The texts that drift is measured on as boundaries, by kind.

    Args:
        model: see `drift_texts`.
        max_length: maximum tokens of each.
        processes: of which the first has the model write its texts.
    """
    encoder = Encoder(model.tokenizer, max_length)
    texts = processes.once(
        lambda: {kind: [_plain(text) for text in texts] for kind, texts in drift_texts(model).items()}
    )
    return {
        kind: [boundary for text in members if (boundary := neutral_boundary(encoder, _text(text))) is not None]
        for kind, members in texts.items()
    }


def _plain(text: Text) -> str | list[Any]:
    """A text as JSON has it."""
    return [*text] if isinstance(text, Passage) else text


def _text(plain: str | list[Any]) -> Text:
    return plain if isinstance(plain, str) else Passage(*plain)
