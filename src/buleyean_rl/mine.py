"""Make rejections: let a model answer, judge the answers, keep what was wrong with them.

prompts --engine--> answers --judge--> records
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from buleyean_rl.cache import cache_folder
from buleyean_rl.engines import Engine, Sampling
from buleyean_rl.evaluate import is_looping, repeated_spans
from buleyean_rl.records import RejectionRecord, make_record
from buleyean_rl.report import write_json

ROUNDS = 60  # a verdict that is certain: of T = 60 rounds every one rejects, and 1/61 of the weight is left


def cached_answers(
    engine: Callable[[], Engine],
    fingerprint: str,
    prompts: Sequence[str],
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to prompts, read from the cache if this model has given them before.

    Args:
        engine: makes the engine, if it is needed.
        fingerprint: of the engine and its model, see `models.fingerprint`.
        prompts: one single-turn conversation each.
        max_tokens: of an answer.
        on_done: called with how many are answered.
    """
    key = json.dumps([fingerprint, max_tokens, list(prompts)])
    file = cache_folder() / f"answers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if file.exists():
        return list(json.loads(file.read_text(encoding="utf-8"))["answers"])
    running = engine()
    try:
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers = running.complete_many(conversations, Sampling(max_tokens=max_tokens), on_done)
    finally:
        running.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"answers": answers})
    return answers


def reject_loops(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    """One record for every answer that loops; what is rejected are the repeats, not the rest of it."""
    return [
        make_record(prompt, [answer], [ROUNDS], ROUNDS, [repeated_spans(answer)])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_looping(answer)
    ]
