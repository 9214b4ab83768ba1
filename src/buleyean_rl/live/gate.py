"""What a model must not do before it takes another's place: move far from its base, or repeat itself.

prompts --base, greedy--> its answers, and how likely it finds them
                          how likely the trained model finds the same tokens --> drift
prompts --trained, greedy--> answers that loop, or are empty
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from buleyean_rl.errors import EngineError
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.inference.endpoint_client import MAX_REPLY_BYTES, TransientError
from buleyean_rl.live.serving import Choice

PROMPTS = 8
TOKENS = 32  # of an answer
SECONDS = 600  # for a request, in the queue of others
FORCING_BIAS = 1e9  # larger than any logit
GREEDY = {"temperature": 0, "samplers": ["temperature"], "n_probs": 1}


@dataclass(frozen=True)
class Limits:
    """What a trained model may do.

    Args:
        drift: mean loss of log-probability of the base's own greedy answers, in nats a token.
        failed: share of answers that loop or are empty, beyond the base's.
    """

    drift: float = 0.5
    failed: float = 0.25


@dataclass(frozen=True)
class Measured:
    """What the gate measured.

    Args:
        drift: see `Limits`.
        base_failed: share of the base's answers that loop or are empty.
        failed: the same of the trained model's.
    """

    drift: float
    base_failed: float
    failed: float

    def violation(self, limits: Limits) -> str | None:
        """Which limit does not hold, for people; None where all do."""
        if not self.drift <= limits.drift:  # nor where it is not a number
            return f"it finds its base's answers less likely by {self.drift:.2f} nats a token; {limits.drift:g} may be"
        if self.failed > self.base_failed + limits.failed:
            return (
                f"{self.failed:.0%} of its answers repeat themselves or are empty; of its base's {self.base_failed:.0%}"
            )
        return None


async def check(base: Choice, trained: Choice, limits: Limits = Limits()) -> Mapping[str, Any]:
    """Compare a model with its base.

    Args:
        base: the base model.
        trained: what is to take its place.
        limits: that must hold.

    Returns:
        What was measured, fit for JSON.

    Raises:
        EngineError: a limit does not hold, or an engine does not answer.
    """
    prompts = read_prompts()
    try:
        own = await asyncio.gather(*(_answer(base, prompt) for prompt in prompts))
        texts = await asyncio.gather(*(_answer(trained, prompt) for prompt in prompts))
        losses = await asyncio.gather(*(_loss(trained, answer) for answer in own))
    except (TransientError, ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{trained.model} is not swapped in: it does not answer: {error}") from None
    tokens = sum(count for _, count in losses)
    measured = Measured(sum(loss for loss, _ in losses) / tokens if tokens else 0.0, _failed(own), _failed(texts))
    if (violation := measured.violation(limits)) is not None:
        raise EngineError(f"{trained.model} is not swapped in: {violation}")
    return asdict(measured)


def read_prompts() -> list[str]:
    """The prompts that are asked."""
    text = (files("buleyean_rl.demo_data") / "held_out_prompts.txt").read_text(encoding="utf-8")
    return text.splitlines()[:PROMPTS]


@dataclass(frozen=True)
class _Answer:
    """A greedy answer.

    Args:
        prompt: token ids.
        text: of the answer.
        tokens: (id, log-probability) of those that the server reports one for; None for the others.
    """

    prompt: list[int]
    text: str
    tokens: list[tuple[int, float | None]]


async def _answer(choice: Choice, prompt: str) -> _Answer:
    messages = {"messages": [{"role": "user", "content": prompt}]}
    rendered = (await _post(choice, "apply-template", messages))["prompt"]
    ids = (await _post(choice, "tokenize", {"content": rendered, "add_special": True}))["tokens"]
    reply = await _post(choice, "completion", GREEDY | {"prompt": ids, "n_predict": TOKENS, "return_tokens": True})
    reported = list(reply.get("completion_probabilities") or ())[::-1]
    tokens: list[tuple[int, float | None]] = []
    for token in reply["tokens"]:  # one that ends inside a character is not reported
        is_reported = bool(reported) and reported[-1]["id"] == token
        tokens.append((token, reported.pop()["logprob"] if is_reported else None))
    return _Answer(ids, reply["content"], tokens)


async def _loss(choice: Choice, answer: _Answer) -> tuple[float, int]:
    """By how much less likely a model finds an answer, in nats, and of how many tokens."""
    ids, loss, count = list(answer.prompt), 0.0, 0
    for token, before in answer.tokens:
        if before is not None:
            forced = GREEDY | {"prompt": ids, "n_predict": 1, "logit_bias": [[token, FORCING_BIAS]]}
            entries = (await _post(choice, "completion", forced)).get("completion_probabilities")
            if entries and entries[0]["id"] == token:  # not one that ends inside a character
                loss, count = loss + before - entries[0]["logprob"], count + 1
        ids.append(token)
    return loss, count


def _failed(answers: list[_Answer]) -> float:
    return sum(not answer.text.strip() or is_looping(answer.text) for answer in answers) / len(answers)


async def _post(choice: Choice, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    with choice.engine.lease():
        reply = await choice.engine.client.send("POST", path, {**request, **choice.fields}, MAX_REPLY_BYTES, SECONDS)
    if reply.status != 200:
        raise TransientError(f"status {reply.status}: {choice.engine.client.show(reply.body.decode(errors='replace'))}")
    value: dict[str, Any] = json.loads(reply.body)
    return value
