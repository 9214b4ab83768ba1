"""A model's chat template: conversations as the text that the model reads.

A template is a program that came with the model. transformers runs it in a sandbox, which bounds neither time nor
output: that is done here. What it refuses, leaves out or cannot show is said, never dropped.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from buleyean_rl.errors import RecordError

Messages = Sequence[Mapping[str, Any]]

SECONDS = 10.0  # for all the conversations rendered at once
MAX_CHARACTERS = 1 << 20  # beside 16 times those of the messages

_OPEN_REASONING = re.compile(r"[<\[](think|thinking|thought|reasoning|THINK)[>\]]\s*\Z")
_CLOSING = {"[": "[/{}]", "<": "</{}>"}
_PROBE = {role: f"message-of-the-{role}" for role in ("system", "user", "assistant")}


class TemplateRefusal(RecordError):
    """A conversation that a chat template cannot render; says why and what to do."""

    messages: Messages = ()


class EndlessTemplate(TemplateRefusal):
    """A template that does not come to an end, whatever the conversation."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """One conversation, see `render_all`.

        Raises:
            TemplateRefusal: the template cannot render it.
        """
        (rendered,) = self.render_all([messages], add_generation_prompt=add_generation_prompt)
        if isinstance(rendered, TemplateRefusal):
            raise rendered
        return rendered

    def render_all(
        self, conversations: Sequence[Messages], *, add_generation_prompt: bool = True
    ) -> list[str | TemplateRefusal]:
        """Conversations as text, or why the template cannot render them.

        Args:
            conversations: with `content` in every message; a system message is folded where the template has none.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            EndlessTemplate: the template does not come to an end.
        """
        rendered: list[str | TemplateRefusal] = []
        folding = [self.needs_folding(messages) for messages in conversations]  # by a probe with its own time limit
        with _time_limit(SECONDS):
            for messages, needs_folding in zip(conversations, folding, strict=True):
                try:
                    folded = fold_system(messages) if needs_folding else messages
                    text = self._apply(folded, add_generation_prompt=add_generation_prompt)
                    _check_rendering(text, folded)
                    rendered.append(text)
                except TemplateRefusal as refusal:
                    rendered.append(refusal)
        return rendered

    def needs_folding(self, messages: Messages) -> bool:
        """Whether a conversation has a system message and the template no place for it."""
        return bool(messages) and messages[0]["role"] == "system" and not self._has_system

    @cached_property
    def turns(self) -> str:
        """What it writes around the turns of a short conversation; "" where it refuses one."""
        return self._probe("user", "assistant", "user") or self._probe("user") or ""

    @cached_property
    def answer_end(self) -> str:
        """What it writes after an answer; "" where it refuses one."""
        return self._probe("user", "assistant").rpartition(_PROBE["assistant"])[2]

    @cached_property
    def open_reasoning(self) -> tuple[str, str] | None:
        """The tag with which it begins every answer, such as `<think>`, and the one that closes it."""
        match = _OPEN_REASONING.search(self._probe("user", add_generation_prompt=True))
        if match is None:
            return None
        return match[0].strip(), _CLOSING[match[0][0]].format(match[1])

    @cached_property
    def _has_system(self) -> bool:
        return _PROBE["system"] in self._probe("system", "user") or not self._probe("user")

    def _probe(self, *roles: str, add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": _PROBE[role]} for role in roles]
        try:
            with _time_limit(SECONDS):
                return self._apply(messages, add_generation_prompt=add_generation_prompt)
        except EndlessTemplate:
            raise
        except TemplateRefusal:
            return ""

    def _apply(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except _TimeIsUp:
            raise
        except Exception as error:  # whatever a program of somebody else's raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TemplateRefusal(
                f"the model's chat template refuses it: {reason}; change its messages or leave it out, --skip-bad does"
            ) from error


def fold_system(messages: Messages) -> list[Mapping[str, Any]]:
    """A conversation with its system message at the head of the first user message.

    Raises:
        TemplateRefusal: there is no user message.
    """
    system, *others = messages
    for index, message in enumerate(others):
        if message["role"] == "user":
            content = f"{system['content']}\n\n{message['content']}"
            return [*others[:index], {**message, "content": content}, *others[index + 1 :]]
    raise TemplateRefusal("the chat template has no place for a system message, and there is no user message after it")


def _check_rendering(text: str, messages: Messages) -> None:
    """Refuse a rendering that is too long, or that leaves out what no reader of the conversation may miss."""
    characters = sum(len(message["content"]) for message in messages)
    if len(text) > MAX_CHARACTERS + 16 * characters:
        raise TemplateRefusal(f"the chat template makes {len(text):,} characters of {characters:,}: use another model")
    for message in messages:
        if message["role"] not in ("user", "assistant") and message["content"].strip() not in text:
            raise TemplateRefusal(
                f"the chat template leaves out messages of the role {message['role']!r}: "
                "change the messages or leave the record out, --skip-bad does"
            )


class _TimeIsUp(Exception):
    """Raised in a thread from outside."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End what runs in this thread after some seconds of the processor's time, with an `EndlessTemplate`."""
    thread, lock, ended, began = threading.get_ident(), threading.Lock(), threading.Event(), time.process_time()

    def watch() -> None:
        while not ended.wait(max(0.05, began + seconds - time.process_time())):
            with lock:
                if not ended.is_set() and time.process_time() >= began + seconds:
                    # The only way to end a loop in the interpreter from outside, whichever thread it is in.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except _TimeIsUp:
        problem = f"the model's chat template has not ended after {seconds:g} s: use another model"
        raise EndlessTemplate(problem) from None
    finally:
        with lock:
            ended.set()
