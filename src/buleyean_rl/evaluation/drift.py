"""What training did to text that it was not about: NLL, KL and entropy of neutral texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from buleyean_rl.evaluation.measure import Material, Settings, evaluate
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source


class NeutralFigures(NamedTuple):
    """Figures of neutral texts, in nats per token.

    Args:
        nll: -log pi(text).
        kl: KL(base || trained); 0 for a base model.
        entropy: of the next token.
    """

    nll: float
    kl: float
    entropy: float


def neutral_figures(source: Source | Model, texts: Sequence[str]) -> NeutralFigures:
    """What training did to neutral texts.

    Args:
        source: of a base model, or of a run; or the model, with its adapter kept.
        texts: plain texts.

    Raises:
        ModelError: the model cannot be loaded.
    """
    figures = evaluate(source, Material(texts=tuple(texts)), Settings(engine="transformers")).figures
    nll, kl, entropy = (figures.get(name) for name in ("neutral_nll", "neutral_kl", "entropy"))
    assert nll is not None
    assert entropy is not None
    return NeutralFigures(nll.value or 0.0, 0.0 if kl is None else kl.value or 0.0, entropy.value or 0.0)
