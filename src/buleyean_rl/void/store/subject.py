"""What a rejection is about: an answer to a prompt, wherever it was given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence


def subject_of(prompt: str, answer: str) -> str:
    """A hash of an answer in its context.

    Args:
        prompt: as JSON: a text, or the messages that led to the answer.
        answer: all of it.
    """
    return hash_texts(prompt, answer)


def hash_texts(*texts: str) -> str:
    """A hash of texts in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def context_of(system: str, history: Sequence[tuple[str, str]], prompt: str) -> str:
    """What a model is asked, as JSON that a record can have for its prompt.

    Args:
        system: the system prompt; may be empty.
        history: earlier (question, answer) pairs.
        prompt: the question.
    """
    if not system and not history:
        return json.dumps(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps([*messages, {"role": "user", "content": prompt}])


def messages_of(context: str) -> list[dict[str, str]]:
    """A context as messages."""
    prompt = json.loads(context)
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
