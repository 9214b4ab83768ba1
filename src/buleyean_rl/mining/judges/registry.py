"""A judge's name on the command line, and the judge it means.

A new judge is a function (in `rules`, or anywhere) and its line in `KINDS`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import JUDGE_KEY_VARIABLE, EndpointEngine
from buleyean_rl.inference.endpoint_client import is_same_host
from buleyean_rl.mining.judges import rules
from buleyean_rl.mining.judges.llm import DEFAULT_RUBRIC, LlmJudge
from buleyean_rl.mining.judges.person import PersonJudge
from buleyean_rl.mining.judges.protocol import FunctionJudge, Judge, describe_exception

ENTRY_POINT_GROUP = "buleyean_rl.judges"


@dataclass(frozen=True)
class Kind:
    """A kind of judge.

    Args:
        argument: what follows the colon of its name, for people; "" if nothing may.
        make: the judge, of its whole name, its argument, and the rubric and `key_url` of an `llm`.
    """

    argument: str
    make: Callable[[str, str, str | None, str | None], Judge]


def find_judge(name: str, *, rubric: str | None = None, key_url: str | None = None) -> Judge:
    """The judge of a name.

    Args:
        name: one of `KINDS`, with its argument after a colon, or an installed entry point of the group
            `buleyean_rl.judges`.
        rubric: for `llm`.
        key_url: the judge's endpoint whose key is in BULEYEAN_JUDGE_API_KEY: another host does not get it; None for
            this judge's.

    Raises:
        UsageError: there is none of that name, or its argument does not fit.
        EngineError: the endpoint of `llm` does not answer.
    """
    kind, colon, argument = name.partition(":")
    if kind not in KINDS:
        return _judge_by(name, _load_entry_point(name))
    if colon and not KINDS[kind].argument:
        raise UsageError(f"the judge `{kind}` takes nothing after its name, not {argument!r}")
    if KINDS[kind].argument and not argument:
        raise UsageError(f"the judge `{kind}` needs something after its name; there are {_list_kinds()}")
    return KINDS[kind].make(name, argument, rubric, key_url)


def _from_rule(make: Callable[[str], Callable[[str, str], Any]]) -> Callable[[str, str, str | None, str | None], Judge]:
    """A judge that is a function made of the argument."""
    return lambda name, argument, *_: FunctionJudge(name, make(argument))


def _judge_by(name: str, function: Callable[[str, str], Any]) -> Judge:
    """Somebody's function as a judge; its name has the hash of its source file, so that an edited one judges anew."""
    inner: Any = inspect.unwrap(function)
    try:
        source = Path(inspect.getfile(inner if inspect.isroutine(inner) else type(inner))).read_bytes()
    except (TypeError, OSError, ValueError):  # it is no function of a file
        return FunctionJudge(name, function)
    return FunctionJudge(f"{name} {hashlib.sha256(source).hexdigest()[:8]}", function)


def _make_words(name: str, path: str, *_: str | None) -> Judge:
    phrases = _read_phrases(path)
    digest = hashlib.sha256("\n".join(phrases).encode()).hexdigest()[:8]
    return FunctionJudge(f"{name} {digest}", rules.words(phrases))


def _make_llm(_name: str, url: str, rubric: str | None, key_url: str | None) -> Judge:
    key_variable = JUDGE_KEY_VARIABLE if key_url is None or is_same_host(key_url, url) else None
    engine = EndpointEngine(url, key_variable=key_variable)
    (server,) = engine.servers
    return LlmJudge(f"llm:{server.url}#{server.model}", engine, rubric or DEFAULT_RUBRIC)


def _list_kinds() -> str:
    return ", ".join(f"{name}:{kind.argument}" if kind.argument else name for name, kind in KINDS.items())


def _parse_limits(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"(\d*)-(\d*)", text)
    if not match or text == "-":
        raise UsageError(f"length:{text}: give the fewest and the most words, such as 10-200, 10- or -200")
    minimum, maximum = int(match[1] or 0), int(match[2]) if match[2] else None
    if maximum is not None and maximum < max(minimum, 1):
        raise UsageError(f"length:{text}: no answer has such a length")
    return minimum, maximum


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"regex:{text}: {error}") from error


def _read_phrases(path: str) -> list[str]:
    try:
        phrases = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"words:{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not phrases:
        raise UsageError(f"words:{path}: the list is empty: give a word or phrase a line")
    return phrases


def _load_function(path: str) -> Callable[[str, str], Any]:
    """`module:function`, the module looked for in the current folder too, as `python -m` does."""
    module, _, attribute = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise UsageError(f"python:{path}: {describe_exception(error)}: give MODULE:FUNCTION") from error
    if not callable(function):
        raise UsageError(f"python:{path}: is not a function of a prompt and an answer")
    return function


def _load_entry_point(name: str) -> Callable[[str, str], Any]:
    installed = entry_points(group=ENTRY_POINT_GROUP, name=name)
    if not installed:
        raise UsageError(f"no judge {name!r}: there are {_list_kinds()}")
    try:
        return next(iter(installed)).load()
    except Exception as error:
        raise UsageError(f"the installed judge {name!r} cannot be loaded: {describe_exception(error)}") from error


KINDS = {
    "loops": Kind("", _from_rule(lambda _: rules.loops)),
    "length": Kind("MIN-MAX", _from_rule(lambda limits: rules.length(*_parse_limits(limits)))),
    "refusal": Kind("", _from_rule(lambda _: rules.refusal)),
    "regex": Kind("PATTERN", _from_rule(lambda text: rules.pattern(_compile(text)))),
    "words": Kind("FILE", _make_words),
    "language": Kind("CODE", _from_rule(rules.language)),
    "llm": Kind("URL", _make_llm),
    "python": Kind("MODULE:FUNCTION", lambda name, path, *_: _judge_by(name, _load_function(path))),
    "person": Kind("", lambda *_: PersonJudge()),
}
