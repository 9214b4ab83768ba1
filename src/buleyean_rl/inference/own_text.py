"""Passages that a base model writes from nothing: what text is like that no rejection is about, without data.

A run's drift is measured on them, and training can anchor them.
"""

from __future__ import annotations

from typing import Any

from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk


def own_passages(model: Model, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Passages of a base model, sampled at temperature 1 from its start token alone; drawn once, then cached.

    Args:
        model: the base, or a model with an adapter, whose base writes.
        count: number of passages.
        tokens: maximum of each, with its start token.
        seed: of the sampling; the i-th passage has seed + i.

    Returns:
        Token ids of each, with its start token, and its end token where it ends by itself.

    Raises:
        ModelError: the model cannot be loaded.
    """
    start = start_token(model.tokenizer)

    def draw() -> dict[str, Any]:
        engine = engine_of(model.base)
        sampling = Sampling(max_tokens=tokens - 1, temperature=1.0, top_p=1.0, seed=seed)
        return {"passages": [[start, *drawn] for drawn in engine.continue_ids([[start]] * count, sampling)]}

    key = [*model.base.numerics_key, start, count, tokens, seed]
    return list(memoize_to_disk("passages", key, draw)["passages"])


def start_token(tokenizer: Any) -> int:
    """The token that a text begins after: BOS, or without one EOS, which ended the text before.

    Args:
        tokenizer: of transformers.
    """
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
