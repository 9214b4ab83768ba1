"""What an endpoint's reply means: an answer, a refusal of the prompt, a fault to retry, or a wrong request."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from buleyean_rl.data.records.values import replace_lone_surrogates
from buleyean_rl.inference.endpoint_client import TransientError
from buleyean_rl.inference.protocol import FILTERED, NO_TEXT, REFUSED, TOO_LONG, Answer, Unanswered

ENVELOPE_VALUES = 4096  # of a reply beside its answer
TOKEN_VALUES = 64  # of a token with its log-probability: its bytes are numbers, and some servers add others
RETRIED_STATUSES = {408, 409, 425, 429}  # and all from 500 on
REFUSAL_STATUSES = {400, 413, 422, 451}
FLAGGED_STATUSES = {*REFUSAL_STATUSES, 403}  # that may be about a prompt's content

# How servers word it: OpenAI, vLLM, llama.cpp, TGI, SGLang, Anthropic, Gemini, LM Studio, Azure, OpenRouter.
LENGTH = re.compile(
    r"context[ _](?:length|size|window)|context_length|exceed_context|too long|too many tokens|max_model_len"
    r"|maximum (?:number of|input|prompt|sequence|context)|string_above_max_length|max_new_tokens.{0,40}must be"
)
CONTENT = re.compile(r"content[ _-]?(?:filter|policy|management)|responsibleai|moderation|flagged|safety")


def read_answer(body: bytes, tokens_asked: int, *, logprobs: bool = False) -> Answer | Unanswered:
    """The answer in the reply of a chat completion.

    Args:
        body: of the reply.
        tokens_asked: for the answer, which with an envelope bound the values in the reply: in memory a list of nothing
            takes thirty times its two brackets.
        logprobs: read the log-probabilities of the answer's tokens, where the reply has them.

    Raises:
        TransientError: there is none in it.
    """
    values = tokens_asked * (TOKEN_VALUES if logprobs else 1)
    if sum(map(body.count, (b"[", b"{", b","))) > ENVELOPE_VALUES + values:
        raise TransientError(f"its reply is no completion: {body[:80]!r}")
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return Unanswered(FILTERED, "the endpoint's content filter stopped the answer")
        message = choice["message"]
        text = message["content"] if message["content"] is not None else message.get("refusal") or ""
        if not text and any(message.get(key) for key in ("reasoning_content", "reasoning")):
            return Unanswered(NO_TEXT, "the answer is reasoning alone: it may need more tokens")
        if not text and message.get("tool_calls"):
            return Unanswered(NO_TEXT, "the answer is a call of a tool")
        tokens = (reply.get("usage") or {}).get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise TransientError(f"its reply is no completion: {body[:80]!r}") from None
    if not isinstance(text, str):
        raise TransientError(f"its reply is no completion: the content is {type(text).__name__}")
    is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
    return Answer(
        replace_lone_surrogates(text),
        tokens if is_count else None,
        choice.get("finish_reason") != "length",
        logprobs=_read_logprobs(choice.get("logprobs")) if logprobs else None,
    )


def _read_logprobs(reported: Any) -> tuple[float, ...] | None:
    """Of the answer's tokens; None where the endpoint has none."""
    try:
        return tuple(float(entry["logprob"]) for entry in reported["content"])
    except (LookupError, TypeError, ValueError):
        return None


def read_refusal(status: int, body: bytes, shown: str) -> Unanswered | None:
    """Why an endpoint refuses a prompt; None where its reply is about something else.

    Args:
        status: of HTTP.
        body: of the reply.
        shown: the body's message, for people.
    """
    detail, words = f"status {status}: {shown}", body.decode(errors="replace").lower()
    if status in FLAGGED_STATUSES and CONTENT.search(words):
        return Unanswered(FILTERED, detail)
    if status == 413 or (status in REFUSAL_STATUSES and LENGTH.search(words)):
        return Unanswered(TOO_LONG, detail)
    return Unanswered(REFUSED, detail, is_permanent=False) if status in REFUSAL_STATUSES else None


def is_retried(status: int) -> bool:
    """Whether a request with this status may succeed later."""
    return status in RETRIED_STATUSES or status >= 500


def error_message(body: bytes) -> str:
    """The message in the body of an error, or the body."""
    text = body.decode(errors="replace")
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return text
    while isinstance(value, Mapping):  # {"error": {"message": ...}} and its relatives
        value = next((value[name] for name in ("error", "message", "detail") if value.get(name)), None)
    return value if isinstance(value, str) else text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait, in numbers or as a date; None where it does not say, or says nonsense."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
