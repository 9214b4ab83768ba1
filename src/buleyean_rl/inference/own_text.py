"""What a base model writes itself: passages from nothing, and answers, drawn once a model and cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.models.packed_attention import PADDED
from buleyean_rl.models.private_interfaces import attending
from buleyean_rl.system.cache import memoize_to_disk

END_OF_TEXT = "<|endoftext|>"  # between the documents that most models were trained on
BATCH = 32


def own_passages(model: Model, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids of passages that the base of a model writes from nothing, at temperature 1.

    Args:
        model: with or without an adapter, which is disabled.
        count: number of passages.
        tokens: of each at most, the first included.
        seed: of the sampling.

    Returns:
        Passages of two tokens at least; there are fewer than `count` where some ended at once.
    """
    start = [start_of_text(model.tokenizer)]
    passages = [start + ids for ids in continue_ids(model, [start] * count, tokens - 1, seed)]
    return [ids for ids in passages if len(ids) > 1]


def continue_ids(model: Model, prompts: Sequence[Sequence[int]], tokens: int, seed: int = 0) -> list[list[int]]:
    """What the base of a model writes after prompts, at temperature 1; without end tokens.

    Args:
        model: with or without an adapter, which is disabled.
        prompts: token ids.
        tokens: drawn at most, for each.
        seed: of the sampling.

    Returns:
        For each prompt token ids; none where the prompt fills the context, or where a control token was drawn.
    """
    sampling = Sampling(tokens, temperature=1.0, top_p=1.0, seed=seed)
    inputs = [*model.numerics_key, [list(ids) for ids in prompts], tokens, seed]

    def draw() -> dict[str, Any]:
        written: list[list[int]] = [[] for _ in prompts]
        with model.adapter_disabled(), model.eval_mode(), attending(model.plain.config, PADDED):
            engine = TransformersEngine(model.plain, model.tokenizer, batch=BATCH)
            fitting = {i: list(ids) for i, ids in enumerate(prompts) if len(ids) < engine.context}
            for i, answer in engine.continue_ids(fitting, sampling):
                written[i] = list(answer.token_ids or ())
        return {"ids": written}

    ids: list[list[int]] = memoize_to_disk("own-text", inputs, draw)["ids"]
    return ids


def start_of_text(tokenizer: Any) -> int:
    """The token that a text of its own begins after: BOS where texts have it, else the end of the text before."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    end = tokenizer.get_vocab().get(END_OF_TEXT)
    known = (token for token in (end, bos, tokenizer.eos_token_id) if token is not None)
    return int(next(known, 0))
