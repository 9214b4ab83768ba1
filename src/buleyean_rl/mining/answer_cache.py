"""Greedy answers to prompts, cached on disk by model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from buleyean_rl.data.records import as_messages
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.system.cache import memoize_to_disk


def cached_answers(
    engine: Callable[[], Engine],
    fingerprint: str,
    prompts: Sequence[str],
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to prompts, read from the cache if this model answered the same prompts before.

    Args:
        engine: makes the engine, if it is needed.
        fingerprint: of the engine and its model.
        prompts: one single-turn conversation each.
        max_tokens: of an answer.
        on_done: called with how many are answered.
    """

    def answer() -> dict[str, Any]:
        running = engine()
        try:
            conversations = [as_messages(prompt) for prompt in prompts]
            return {"answers": running.complete_many(conversations, Sampling(max_tokens=max_tokens), on_done)}
        finally:
            running.close()

    return list(memoize_to_disk("answers", [fingerprint, max_tokens, list(prompts)], answer)["answers"])
