"""What a base model writes itself, without data: passages from nothing, and what it says after prompts.

A run's drift is measured on such text, and training anchors it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk

END_OF_TEXT = "<|endoftext|>"  # between the documents that most models were trained on


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
    start = [start_token(model.tokenizer)]
    return [start + ids for ids in own_continuations(model, [start] * count, tokens - 1, seed)]


def own_continuations(model: Model, prompts: Sequence[Sequence[int]], tokens: int, seed: int = 0) -> list[list[int]]:
    """What a base model says after prompts, sampled at temperature 1; drawn once, then cached.

    Args:
        model: the base, or a model with an adapter, whose base writes.
        prompts: token ids, one each at least, with room in the context.
        tokens: maximum of each.
        seed: of the sampling; the i-th has seed + i.

    Returns:
        Token ids of each, with its end token where it ends by itself.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def draw() -> dict[str, Any]:
        sampling = Sampling(max_tokens=tokens, temperature=1.0, top_p=1.0, seed=seed)
        return {"ids": engine_of(model.base).continue_ids(prompts, sampling)}

    key = [*model.base.numerics_key, [list(ids) for ids in prompts], tokens, seed]
    return list(memoize_to_disk("own-text", key, draw)["ids"])


def start_token(tokenizer: Any) -> int:
    """The token that a text of its own begins after: BOS where texts have it, else what ended the text before.

    Args:
        tokenizer: of transformers.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    known = (tokenizer.get_vocab().get(END_OF_TEXT), bos, tokenizer.eos_token_id)
    return int(next((token for token in known if token is not None), 0))
