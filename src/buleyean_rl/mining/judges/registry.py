"""A judge's name on the command line, and what it means."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.mining.judges import rules
from buleyean_rl.mining.judges.llm import DEFAULT_RUBRIC, LlmJudge
from buleyean_rl.mining.judges.person import PersonJudge
from buleyean_rl.mining.judges.protocol import FunctionJudge, Judge

GROUP = "buleyean_rl.judges"  # of entry points
KNOWN = (
    "loops, length:MIN-MAX, refusal, regex:PATTERN, words:FILE, language:CODE, llm:URL, python:MODULE:FUNCTION, person"
)


def find_judge(name: str, *, rubric: str | None = None) -> Judge:
    """The judge of a name.

    Args:
        name: one of the kinds in `KNOWN`, or an installed entry point of the group `buleyean_rl.judges`.
        rubric: for `llm`.

    Raises:
        UsageError: there is none of that name, or what follows its colon does not fit.
        EngineError: the endpoint of `llm` does not answer.
    """
    kind, colon, rest = name.partition(":")
    if kind in ("loops", "refusal", "person") and colon:
        raise UsageError(f"the judge `{kind}` takes nothing after its name, not {rest!r}")
    if kind in ("length", "regex", "words", "language", "llm", "python") and not rest:
        raise UsageError(f"the judge `{kind}` needs something after its name; there are {KNOWN}")
    match kind:
        case "loops":
            return FunctionJudge(name, rules.loops)
        case "refusal":
            return FunctionJudge(name, rules.refusal)
        case "person":
            return PersonJudge()
        case "length":
            return FunctionJudge(name, rules.length(*_limits(rest)))
        case "regex":
            return FunctionJudge(name, rules.pattern(_expression(rest)))
        case "words":
            listed = _lines(rest)
            digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:8]
            return FunctionJudge(f"{name} {digest}", rules.words(listed))
        case "language":
            return FunctionJudge(name, rules.language(rest))
        case "llm":
            engine = EndpointEngine(rest)
            return LlmJudge(f"llm:{engine.url}#{engine.model}", engine, rubric or DEFAULT_RUBRIC)
        case "python":
            return FunctionJudge(name, _function(rest))
    return FunctionJudge(name, _entry_point(name))


def _limits(text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"(\d*)-(\d*)", text)
    if not found or text == "-":
        raise UsageError(f"length:{text}: give the fewest and the most words, such as 10-200, 10- or -200")
    least, most = int(found[1] or 0), int(found[2]) if found[2] else None
    if most is not None and most < max(least, 1):
        raise UsageError(f"length:{text}: no answer has such a length")
    return least, most


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"regex:{text}: {error}") from error


def _lines(path: str) -> list[str]:
    try:
        listed = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"words:{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not listed:
        raise UsageError(f"words:{path}: the list is empty: give a word or phrase a line")
    return listed


def _function(path: str) -> Callable[[str, str], Any]:
    """`module:function`, the module looked for in the current folder too, as `python -m` does."""
    module, _, attribute = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"python:{path}: {error}: give MODULE:FUNCTION") from error
    if not callable(function):
        raise UsageError(f"python:{path}: is not a function of a prompt and an answer")
    return function


def _entry_point(name: str) -> Callable[[str, str], Any]:
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise UsageError(f"no judge {name!r}: there are {KNOWN}")
    return next(iter(found)).load()
