"""What every page shows: models, counts, the run under way.

GET /api/state, /api/events: the state whenever it changes
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from buleyean_rl.void.services import Void, services
from buleyean_rl.void.store import Row

POLL_SECONDS = 0.2  # between looks at the state
LOOKS_A_BEAT = 25  # after which a sign of life is sent
BEAT = ":\n\n"  # a comment: by it a page hears that the server is there


async def _state(request: Request) -> Response:
    return JSONResponse(await run_in_threadpool(_read_state, services(request)))


def _read_state(void: Void) -> Row:
    run = void.store.runs.get(void.training.running) if void.training.running is not None else None
    if run is not None:
        run = {name: run[name] for name in ("id", "state", "steps", "records")} | {"points": run["points"][-1:]}
    models = {side: model.name for side, model in void.answering.models.items()}
    return {
        "models": models,
        "rejections": void.store.rejections.count(),
        "running": run,
        "changes": void.store.changes,
    }


async def _events(request: Request) -> Response:
    void = services(request)

    async def changes() -> AsyncIterator[str]:
        last_sent: Any = None
        for look in itertools.count(1):
            now = (void.store.changes, len(void.answering.models), void.training.running)
            if now != last_sent:
                last_sent = now
                yield event(await run_in_threadpool(_read_state, void))
            elif look % LOOKS_A_BEAT == 0:
                yield BEAT
            await asyncio.sleep(POLL_SECONDS)

    return event_stream(changes())


def event(value: Row) -> str:
    """A value as a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def event_stream(events: AsyncIterator[str]) -> Response:
    """A reply of server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


ROUTES = [
    Route("/api/state", _state, methods=["GET"]),
    Route("/api/events", _events, methods=["GET"]),
]
