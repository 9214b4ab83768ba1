"""Values of a JSON row: looked up, checked, and described in error messages.

Errors raised here name no place: the reader of the file adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from buleyean_rl.errors import RecordError

MAX_INTEGER = 2**31 - 1  # counts travel as 32-bit integers further on
MAX_KEYS_LISTED = 12


def fail(problem: str) -> NoReturn:
    """Raise a RecordError without a place."""
    raise RecordError(problem)


def pick(row: Mapping[str, Any], *spellings: str) -> Any:
    """The value a row has under one of several spellings of a key; None if missing or null.

    Raises:
        RecordError: two spellings are given at once.
    """
    found, found_as = None, ""
    for name in spellings:
        value = row.get(name)
        if value is None:
            continue
        if found is not None:
            fail(f"has both {found_as!r} and {name!r}, which mean the same: keep one")
        found, found_as = value, name
    return found


def parse_text(value: object, name: str) -> str:
    """Text that every tokenizer and every UTF-8 file can hold, see `replace_lone_surrogates`.

    Args:
        value: from JSON.
        name: what to call it in an error.

    Raises:
        RecordError: not text.
    """
    if not isinstance(value, str):
        fail(f"{name} is {describe(value)}: it must be text")
    return replace_lone_surrogates(value)


def replace_lone_surrogates(text: str) -> str:
    """A text in which each half of a surrogate pair became U+FFFD, as in a text that was cut inside an emoji.

    A pair that stands as two halves becomes its character.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def parse_integer(value: object, name: str, minimum: int) -> int:
    """A whole number from `minimum` to `MAX_INTEGER`.

    Args:
        value: from JSON.
        name: what to call it in an error.
        minimum: inclusive.

    Raises:
        RecordError: another type, true or false, or out of range.
    """
    # isinstance alone would let true and false through.
    if not isinstance(value, int) or isinstance(value, bool):
        fail(f"{name} is {describe(value)}: it must be a whole number, {minimum} or more")
    if not minimum <= value <= MAX_INTEGER:
        fail(f"{name} is {describe(value)}: it must be between {minimum} and {MAX_INTEGER}")
    return value


def describe(value: object) -> str:
    """What a JSON value is, short enough for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        # Python refuses to print an integer of thousands of digits, and nobody could read it.
        return f"the number {value}" if abs(value) < 10**20 else "a huge number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def list_keys(row: Mapping[str, Any]) -> str:
    """The keys of a row, for an error message."""
    return ", ".join(list(row)[:MAX_KEYS_LISTED]) or "none"
