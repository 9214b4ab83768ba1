"""The base's own greedy answers to prompts that were never a problem, and whether a trained model still gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.evaluation.neutral_text import Passage
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.evaluation.statistics import UNCOUNTED, Figure
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.progress import answer_all
from buleyean_rl.inference.protocol import Answer, Outcome, Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import memoize_to_disk

BEGINNING = 32  # tokens of an answer that are compared


def kept_answers(
    model: Model, prompts: Sequence[Prompt], max_tokens: int, context: int | None, console: Console
) -> list[Passage]:
    """The base's greedy answers behind their prompts, computed once, then cached.

    Args:
        model: a run's, whose base answers.
        prompts: of any kind.
        max_tokens: of an answer.
        context: see `open_engine`.
        console: for progress.

    Returns:
        One for each prompt; without ids where the base's answer loops, is empty, or is missing.
    """

    def answer() -> dict[str, Any]:
        engine, conversations = engine_of(model.base, context), [as_messages(prompt) for prompt in prompts]
        outcomes = answer_all(engine, conversations, Sampling(max_tokens=max_tokens), console, "the base answers")
        return {"answers": [_sound_ids(outcome) for outcome in outcomes]}

    key = [*model.base.numerics_key, max_tokens, context, list(prompts)]
    answers = memoize_to_disk("kept-answers", key, answer)["answers"]
    encoder = Encoder(model.tokenizer, skip_refused=True)
    before = [prompt.ids for prompt in encoder.encode_conversations([as_messages(prompt) for prompt in prompts])]
    pairs = zip(before, answers, strict=True)
    return [Passage([*prompt, *ids], len(prompt)) if ids else Passage([]) for prompt, ids in pairs]


def _sound_ids(outcome: Outcome) -> list[int]:
    is_sound = isinstance(outcome, Answer) and outcome.token_ids and not is_looping(outcome.text)
    return list(outcome.token_ids or ()) if isinstance(outcome, Answer) and is_sound else []


def unchanged_share(kept: Sequence[Passage], outcomes: Sequence[Outcome]) -> Figure:
    """Share of greedy answers that begin as the base's, token by token.

    Args:
        kept: see `kept_answers`.
        outcomes: the trained model's, to the same prompts.
    """
    items = []
    for passage, outcome in zip(kept, outcomes, strict=True):
        if not passage.ids or not isinstance(outcome, Answer) or outcome.token_ids is None:
            items.append(UNCOUNTED)
            continue
        base = passage.ids[passage.start :][:BEGINNING]
        items.append((float(base == list(outcome.token_ids[:BEGINNING])), 1.0))
    return Figure(items)
