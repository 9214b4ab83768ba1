"""Greedy answers to prompts, cached on disk by model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from buleyean_rl.data.records import as_messages
from buleyean_rl.errors import EngineError
from buleyean_rl.inference.progress import answer_all
from buleyean_rl.inference.protocol import Completer, Sampling, Unanswered
from buleyean_rl.system.cache import memoize_to_disk


def cached_answers(
    engine: Callable[[], Completer],
    fingerprint: str,
    prompts: Sequence[str],
    max_tokens: int,
    console: Console,
    label: str,
) -> list[str]:
    """Greedy answers to prompts, read from the cache if this model answered the same prompts before.

    Args:
        engine: makes the engine, if it is needed.
        fingerprint: of the engine and its model.
        prompts: one single-turn conversation each.
        max_tokens: of an answer.
        console: where progress is shown.
        label: of the answers, there.

    Raises:
        EngineError: a prompt has no answer.
    """

    def answer() -> dict[str, Any]:
        running = engine()
        try:
            conversations = [as_messages(prompt) for prompt in prompts]
            outcomes = answer_all(running, conversations, Sampling(max_tokens=max_tokens), console, label)
        finally:
            running.close()
        texts = []
        for outcome in outcomes:
            if isinstance(outcome, Unanswered):
                raise EngineError(outcome.detail)
            texts.append(outcome.text)
        return {"answers": texts}

    return list(memoize_to_disk("answers", [fingerprint, max_tokens, list(prompts)], answer)["answers"])
