"""What training did to text that it was not about: KL, entropy and NLL, on two kinds of text that need no data.

own        passages that the base itself wrote
bundled    short paragraphs on varied topics
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from buleyean_rl import demo_data
from buleyean_rl.evaluation.neutral_text import Passage
from buleyean_rl.evaluation.scoring import PackedScorer, Text, TextScore
from buleyean_rl.inference.own_text import own_passages
from buleyean_rl.models.model import Model

OWN, BUNDLED = "own", "bundled"
TITLES = {OWN: "the base's own passages", BUNDLED: "bundled texts"}
PASSAGES, PASSAGE_TOKENS = 16, 256


class Drift(NamedTuple):
    """What training did to texts, in nats per token.

    Args:
        kl: KL(base || trained) over the vocabulary; 0 for a base model.
        entropy_base: of the base's next token.
        entropy: of the trained model's next token.
        nll_base: -log pi_base(text).
        nll: -log pi(text).
    """

    kl: float
    entropy_base: float
    entropy: float
    nll_base: float
    nll: float


Drifts = Mapping[str, Drift]  # by kind of text


def drift_texts(model: Model) -> dict[str, list[Text]]:
    """The two kinds of text of a model; its base writes the passages unless they are cached.

    Args:
        model: with or without an adapter.

    Raises:
        ModelError: the model cannot be loaded.
    """
    own = own_passages(model, PASSAGES, PASSAGE_TOKENS)
    return {OWN: [Passage(ids) for ids in own], BUNDLED: [*demo_data.neutral_texts()]}


def measure_drift(model: Model, max_tokens: int = PASSAGE_TOKENS) -> dict[str, Drift]:
    """What training did to the two kinds of text, base and trained model in one pass.

    Args:
        model: with its adapter; or a base model, which has none.
        max_tokens: of each text.

    Raises:
        ModelError: the model cannot be loaded.
    """
    texts = drift_texts(model)
    scores = iter(PackedScorer(model, max_tokens).texts([text for kind in texts.values() for text in kind]))
    return {kind: sum_drift([next(scores) for _ in members]) for kind, members in texts.items()}


def sum_drift(scores: Sequence[TextScore | None]) -> Drift:
    """The drift over texts that were scored with full distributions."""
    counted = [score for score in scores if score is not None]
    tokens = max(sum(score.tokens for score in counted), 1)

    def per_token(name: str) -> float:
        return sum(getattr(score, name) or 0.0 for score in counted) / tokens

    nll, entropy = per_token("nats"), per_token("entropy")
    if any(score.kl is None for score in counted):
        return Drift(0.0, entropy, entropy, nll, nll)
    return Drift(per_token("kl"), per_token("reference_entropy"), entropy, per_token("reference_nats"), nll)


def find_moved_text(drifts: Drifts, max_kl: float, max_entropy: float) -> str | None:
    """Which kind of text has moved too far, and how, in words; None if none has.

    Args:
        drifts: by kind of text.
        max_kl: in nats per token.
        max_entropy: largest change of the entropy, as a share of the base's.
    """
    for kind, drift in drifts.items():
        title = TITLES[kind]
        if not all(map(math.isfinite, drift)):
            return f"probabilities of {title} are not numbers any more"
        if drift.kl > max_kl:
            return f"{title} moved by KL {drift.kl:.3f} nats per token, more than {max_kl:g}"
        if abs(drift.entropy - drift.entropy_base) > max_entropy * drift.entropy_base:
            return (
                f"the entropy of {title} went from {drift.entropy_base:.2f} to {drift.entropy:.2f} nats per token, by "
                f"more than {max_entropy:.0%}"
            )
    return None


def largest_kl(drifts: Drifts) -> float:
    """The KL of the kind of text that moved farthest, in nats per token."""
    return max(drift.kl for drift in drifts.values())


def as_drifts(value: Mapping[str, Mapping[str, Any]]) -> dict[str, Drift]:
    """Drifts from what JSON holds of them; see `as_json`.

    Raises:
        TypeError: it is of another version.
    """
    return {kind: Drift(**figures) for kind, figures in value.items()}


def as_json(drifts: Drifts) -> dict[str, dict[str, float]]:
    """Drifts for JSON, by kind of text."""
    return {kind: drift._asdict() for kind, drift in drifts.items()}


def describe_drift(drift: Drift) -> str:
    """A drift in words."""
    return (
        f"KL {drift.kl:.3f}, entropy {drift.entropy_base:.2f} -> {drift.entropy:.2f}, "
        f"NLL {drift.nll_base:.3f} -> {drift.nll:.3f}"
    )
