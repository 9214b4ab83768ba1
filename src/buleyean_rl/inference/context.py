"""How many tokens a conversation may have: as many as the model was made for, as memory allows."""

from __future__ import annotations

from typing import Protocol

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.protocol import REFUSED, TOO_LONG, Messages, RefusedPrompt, Unanswered
from buleyean_rl.system.wording import counted

MEMORY_SHARE = 0.5  # of the free memory, for keys and values of all conversations
DEFAULT_TOKENS = 2048  # where a model does not say
MIN_TOKENS = 512  # whatever the memory


def affordable_tokens(bytes_per_token: int, free_bytes: int) -> int:
    """The tokens whose keys and values, or whatever else a token takes, fit into free memory."""
    return max(MIN_TOKENS, int(free_bytes * MEMORY_SHARE) // max(1, bytes_per_token))


def choose_context(requested: int | None, own: int | None, affordable: int) -> int:
    """The maximum tokens of a conversation, prompt and answer.

    Args:
        requested: by the user, who may know the memory better; None for the model's own.
        own: what the model was made for, and the most; None where it does not say.
        affordable: see `affordable_tokens`.

    Raises:
        UsageError: fewer than two tokens are requested.
    """
    if requested is not None:
        if requested < 2:
            raise UsageError(f"a context of {counted(requested, 'token')}: a prompt and an answer need at least 2")
        return requested if own is None else min(requested, own)
    return min(own or DEFAULT_TOKENS, affordable)


class ContextEngine(Protocol):
    """An engine that knows its context."""

    context: int

    def prompt_ids(self, messages: Messages) -> list[int]:
        """See `Engine.prompt_ids`."""


def fit_prompt(engine: ContextEngine, messages: Messages) -> list[int] | Unanswered:
    """A conversation's token ids, which leave a token of the context for the answer; or why it cannot be answered."""
    try:
        ids = engine.prompt_ids(messages)
    except RefusedPrompt as error:
        return Unanswered(REFUSED, str(error))
    if len(ids) < engine.context:
        return ids
    return Unanswered(
        TOO_LONG,
        f"the conversation has {counted(len(ids), 'token')} and the context holds {engine.context:,}: "
        "start a new one, or ask for a larger context",
    )
