"""Bodies of requests, read within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

BODY_SECONDS = 10  # for the first bytes of a body; then as many bytes a second at least:
MIN_RATE = 16 * 1024


async def read_body(request: Request, max_bytes: int) -> bytes:
    """A request's body, read no further than the limit and no longer than a slow line takes."""
    parts: list[bytes] = []
    length, begin = 0, asyncio.get_running_loop().time()
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout_at(begin + BODY_SECONDS + length / MIN_RATE):
                part = await anext(stream, None)
            if part is None:
                return b"".join(parts)
            length += len(part)
            if length > max_bytes:
                raise HTTPException(413, f"too large: {max_bytes // 1024:,} KB at most")
            parts.append(part)
    except TimeoutError:
        raise HTTPException(408, "the rest of the request did not come", {"Connection": "close"}) from None


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """A request's body, which must be a JSON object."""
    raw = await read_body(request, max_bytes)
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HTTPException(400, "expected a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
