"""Take a model's reasoning out of a logged answer: the person who rated it saw the rest."""

from __future__ import annotations

import re

# Open WebUI folds reasoning and calls of tools into the message, as HTML that no model wrote so.
_OPENINGS = re.compile(r'<details type="(reasoning|tool_calls|code_interpreter)"|\A\s*<(think|thinking|reasoning)>')
_CALLS = re.compile(r'<details type="(?:tool_calls|code_interpreter)"')
_SPACE = re.compile(r"\s*")
_THINK_END = "</think>"


def strip_reasoning(text: str) -> str:
    """A text without its folded blocks, and without a block of <think> at its start.

    Some templates write `<think>` themselves, so that the log has only its end. A block that is never closed reaches
    to the end of the text. Linear in the text.
    """
    pieces, position = [], 0
    while opening := _OPENINGS.search(text, position):
        closing = "</details>" if opening[1] else f"</{opening[2]}>"
        pieces.append(text[position : opening.start()])
        end = text.find(closing, opening.end())
        if end < 0:
            return "".join(pieces)
        position = _skip_space(text, end + len(closing))
    if not position and _THINK_END in text:
        position = _skip_space(text, text.index(_THINK_END) + len(_THINK_END))
    return "".join([*pieces, text[position:]])


def has_folded_calls(text: str) -> bool:
    """Whether a message of Open WebUI has calls of tools folded into it."""
    return _CALLS.search(text) is not None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
