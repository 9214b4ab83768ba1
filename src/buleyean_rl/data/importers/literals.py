"""Lists and objects that arrive as text: in JSON, or as Python and NumPy print them."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from buleyean_rl.data.records import decode_json
from buleyean_rl.data.records.messages import is_message
from buleyean_rl.data.records.values import fail
from buleyean_rl.errors import RecordError

MAX_PYTHON_TEXT = 1 << 22  # characters; Python's parser takes some hundred bytes for each
_BEGINS_LIKE_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|from|content|value|lc|type)["']\s*:""")
# NumPy prints no commas; a real line end never stands within a text that Python prints.
_NUMPY_GAP = re.compile(r"\}[^\S\n]*\n\s*\{")


def parse_literal(text: str) -> Any:
    """The list, object or text that a text spells out, in JSON or as Python prints it; None if it is none of these."""
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] not in ("[]", "{}", '""'):
        return None
    try:
        value = decode_json(stripped)
    except RecordError:
        value = None if stripped[0] == '"' else _parse_python(stripped)
    return value if isinstance(value, list | dict | str) else None


def parse_messages_text(text: str, name: str) -> list[Any] | None:
    """The messages that a text spells out; None where it is a text like any other.

    Raises:
        RecordError: it looks like messages, and cannot be parsed.
    """
    if _BEGINS_LIKE_MESSAGES.match(text) is None:
        return None
    value = parse_literal(text)
    messages = value if isinstance(value, list) else [value]
    if messages and all(map(is_message, messages)):
        return messages
    if value is None and text.rstrip().endswith(("]", "}")):
        fail(f"{name} looks like messages written as text, and is neither JSON nor a Python list: export it as JSON")
    return None


def _parse_python(text: str) -> Any:
    if len(text) > MAX_PYTHON_TEXT:
        return None
    for source in (text, _NUMPY_GAP.sub("}, {", text)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's text
            try:
                return ast.literal_eval(source)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    return None
