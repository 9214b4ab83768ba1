"""What a request may hold: fields are checked before they are used.

A wrong one is answered 400, 404, 408 or 413; nothing that a client can send is an error of the server's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from buleyean_rl.void.store import MAX_INTEGER, Row
from buleyean_rl.web.body import read_object

MAX_BODY = 256 * 1024  # bytes
MAX_SPANS = 1_000
UID = re.compile(r"[A-Za-z0-9-]{8,64}")


async def read_json(request: Request) -> Row:
    """A request's body, which must be a JSON object."""
    return await read_object(request, MAX_BODY)


def path_id(request: Request) -> int:
    """The number in a request's path."""
    text = request.path_params["id"]
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > MAX_INTEGER:
        raise HTTPException(404, "there is nothing of that number")
    return int(text)


def path_uid(request: Request) -> str:
    """The client's name in a request's path."""
    uid = request.path_params["uid"]
    if not UID.fullmatch(uid):
        raise HTTPException(404, "there is nothing of that name")
    return str(uid)


def parse_uid(values: Mapping[str, Any], name: str = "uid") -> str:
    """A client's name for what it sends."""
    uid = values.get(name)
    if not isinstance(uid, str) or not UID.fullmatch(uid):
        raise HTTPException(400, f"{name} must be 8 to 64 letters, digits and dashes")
    return uid


def parse_text(values: Mapping[str, Any], name: str, max_characters: int, default: str | None = None) -> str:
    """A text that every tokenizer and the store can hold."""
    value = values.get(name, default)
    if not isinstance(value, str) or len(value) > max_characters:
        raise HTTPException(400, f"{name} must be a text of at most {max_characters:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise HTTPException(400, f"{name} holds half a character") from None
    return value


def parse_integer(values: Mapping[str, Any], name: str, minimum: int, maximum: int, default: int | None = None) -> int:
    """A whole number within bounds."""
    value = values.get(name, default)
    if type(value) is not int or not minimum <= value <= maximum:
        raise HTTPException(400, f"{name} must be a whole number from {minimum} to {maximum:,}")
    return value


def parse_number(values: Mapping[str, Any], name: str, minimum: float, maximum: float, default: float) -> float:
    """A number within bounds."""
    value = values.get(name, default)
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise HTTPException(400, f"{name} must be a number from {minimum:g} to {maximum:g}")
    return float(value)


def parse_list(values: Mapping[str, Any], name: str, kind: type, maximum: int) -> list[Any]:
    """A list of texts or whole numbers, at least one."""
    value = values.get(name)
    if not isinstance(value, list) or not 1 <= len(value) <= maximum or any(type(each) is not kind for each in value):
        what = "texts" if kind is str else "whole numbers"
        raise HTTPException(400, f"{name} must be a list of 1 to {maximum:,} {what}")
    if kind is int and not all(0 <= each <= MAX_INTEGER for each in value):
        raise HTTPException(400, f"{name} holds a number that nothing can have")
    return [parse_text({name: each}, name, MAX_BODY) if kind is str else each for each in value]


def parse_flag(values: Mapping[str, Any], name: str) -> bool:
    """True or false; false where it is not given."""
    value = values.get(name, False)
    if type(value) is not bool:
        raise HTTPException(400, f"{name} must be true or false")
    return value


def parse_spans(values: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The rejected parts of an answer, as character offsets; none for the whole."""
    spans = values.get("spans", [])
    if (
        not isinstance(spans, list)
        or len(spans) > MAX_SPANS
        or not all(isinstance(span, list) and [type(offset) for offset in span] == [int, int] for span in spans)
    ):
        raise HTTPException(400, f"spans must be a list of at most {MAX_SPANS:,} pairs [start, end] of whole numbers")
    return tuple((start, end) for start, end in spans)


def query_integer(request: Request, name: str, max_digits: int) -> int:
    """A whole number of a request's query; 0 where it is not given."""
    text = request.query_params.get(name, "0")
    if not re.fullmatch(rf"[0-9]{{1,{max_digits}}}", text):
        raise HTTPException(400, f"{name} must be a whole number of at most {max_digits} digits")
    return int(text)


def query_number(request: Request, name: str) -> float | None:
    """A number of a request's query; None where it is not given."""
    text = request.query_params.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HTTPException(400, f"{name} must be a number")
    return value
