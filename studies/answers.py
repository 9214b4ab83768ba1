"""Answers of a model to the prompts of a study."""

from __future__ import annotations

from collections.abc import Sequence

from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.errors import EngineError
from buleyean_rl.inference.protocol import Answer, Engine, Sampling, Unanswered


def draw(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
    """Answers, in the order of the prompts.

    Raises:
        EngineError: a prompt has none.
    """
    outcomes = engine.answer_many([as_messages(prompt) for prompt in prompts], sampling)
    if refused := [outcome for outcome in outcomes if isinstance(outcome, Unanswered)]:
        raise EngineError(f"{len(refused)} prompts have no answer: {refused[0].detail}")
    return [outcome for outcome in outcomes if isinstance(outcome, Answer)]
