"""The `--column` line that would read a row whose format nobody knows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

_PARTS_OF_NAMES = {  # in the order in which roles choose their columns
    "score": ("score", "rating", "stars", "label", "thumb", "vote", "feedback", "verdict", "grade"),
    "answer": ("answer", "response", "completion", "reply", "output", "generation", "assistant", "rejected", "text"),
    "prompt": (
        "prompt",
        "question",
        "query",
        "instruction",
        "input",
        "user",
        "request",
        "message",
        "ask",
        "conversation",
    ),
}
MAX_COLUMNS = 200


def suggest_columns(row: Mapping[str, Any]) -> str:
    """What to type, with the row's own names where they say what they hold."""
    names = list(_list_paths(row))[:MAX_COLUMNS]
    chosen: dict[str, str] = {}
    for role, parts in _PARTS_OF_NAMES.items():
        matches = (name for part in parts for name in names if part in name.rpartition(".")[2].casefold())
        name = next((name for name in matches if name not in chosen.values()), None)
        if name is not None:
            chosen[role] = name
    arguments = [f"{role}={chosen.get(role, 'NAME')}" for role in ("prompt", "answer")]
    arguments += [f"score={chosen['score']}"] if "score" in chosen else []
    return " ".join(f"--column {shlex.quote(' '.join(argument.split()))}" for argument in arguments)


def _list_paths(row: Mapping[str, Any]) -> Iterator[str]:
    """The names of a row's values; of objects in it those of theirs, with dots."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield str(name)
