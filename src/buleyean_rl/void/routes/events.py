"""Streams of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from buleyean_rl.void.store import Row

BEAT = ":\n\n"  # a comment: by it a page hears that the server is there


def event(value: Row) -> str:
    """A value as a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def event_stream(events: AsyncIterator[str]) -> Response:
    """A reply of server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
