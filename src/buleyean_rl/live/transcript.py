"""What a completion was, put together from the parts of its reply: text, token ids, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
MAX_CHARACTERS = 1 << 20  # of a prompt and its answer that are remembered
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Completion:
    """An answer to a conversation, as it was drawn.

    Args:
        id: by which feedback names it.
        messages: of the conversation, before the answer.
        answer: its text.
        token_ids: the tokens drawn, without the end token; None where the engine did not report them all.
        ended: whether it came to its end.
        temperature: asked for; None for the engine's own.
    """

    id: str
    messages: list[dict[str, str]]
    answer: str
    token_ids: list[int] | None
    ended: bool
    temperature: float | None


@dataclass
class Transcript:
    """Listens to the reply of a chat completion.

    Args:
        body: of the client's request.
    """

    body: Mapping[str, Any]
    _id: str = ""
    _text: str = ""
    _tokens: list[int] = field(default_factory=list)
    _count: int | None = None
    _finish: str | None = None
    _is_plain: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the request by which the engine reports its tokens."""
        if not self.body.get("stream"):
            return {"verbose": True, "return_tokens": True}
        return {} if self.body.get("logprobs") else {"logprobs": True, "top_logprobs": 1}

    def read(self, event: Event) -> Event:
        """Take in a part of the reply; returns it as the client asked for it."""
        self._id = event.get("id", self._id)
        verbose = event.pop("__verbose", None)
        for choice in event.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or {}
            self._is_plain &= choice.get("index") == 0 and not {"tool_calls", "reasoning_content"} & part.keys()
            self._text += part.get("content") or ""
            self._finish = choice.get("finish_reason") or self._finish
            self._tokens += [entry["id"] for entry in (choice.get("logprobs") or {}).get("content") or ()]
            if not self.body.get("logprobs") and self.body.get("stream"):
                choice.pop("logprobs", None)
        if verbose is not None and verbose.get("tokens"):
            self._tokens = list(verbose["tokens"])
        self._count = event.get("timings", {}).get("predicted_n", self._count)
        return event

    def completion(self) -> Completion | None:
        """What was heard; None where it is no plain answer to a plain conversation."""
        messages = self.body.get("messages")
        if not self._id or not self._is_plain or not isinstance(messages, list) or not all(map(_is_plain, messages)):
            return None
        if len(self._text) + sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
            return None
        temperature = self.body.get("temperature")
        return Completion(
            self._id,
            [{"role": message["role"], "content": message["content"]} for message in messages],
            self._text,
            self._drawn(),
            self._finish == "stop",
            float(temperature) if isinstance(temperature, (int, float)) else None,
        )

    def _drawn(self) -> list[int] | None:
        """The tokens without the one that ended the answer; of a character of several tokens the last is reported."""
        if self._count is None or not self._text.strip() or self.body.get("stop"):
            return None
        count = self._count - (self._finish == "stop")
        return self._tokens[:count] if count <= len(self._tokens) <= self._count else None


def _is_plain(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        return False
    return isinstance(message.get("content"), str) and not message.get("tool_calls")
