"""What every page shows: who answers, counts, what Train would do, the run under way.

GET /api/state, /api/events: the state whenever it changes
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.routes.events import BEAT, event, event_stream
from buleyean_rl.void.services import Loading, Void, loading
from buleyean_rl.void.shown import show_pair, show_run, undecided
from buleyean_rl.void.store import Row

POLL_SECONDS = 0.2  # between looks at the state
LOOKS_A_BEAT = 25  # after which a sign of life is sent
LOOKS_OF_A_RUN = 5  # after which the time left of a run is told anew
LOOKS_WHILE_LOADING = 2  # after which the share that is loaded is told anew
NEWEST = 3  # rejections


async def _state(request: Request) -> Response:
    return JSONResponse(await run_in_threadpool(_read_state, loading(request)))


def _read_state(found: Loading) -> Row:
    void = found.void
    if void is None:
        share, seconds = (None, None) if found.clock is None else found.clock.left()
        return {"loading": {"what": found.what, "share": share, "seconds_left": seconds}}
    store, running = void.store, void.training.running
    run = store.runs.get(running) if running is not None else None
    return {
        "loading": None,
        "pair": show_pair(void),
        "rejections": store.rejections.count(),
        "conversations": store.conversations.count(),
        "models": sum(not void.models.problem(each) for each in store.runs.list()),
        "batches": store.batches.count(),
        "newest": store.rejections.newest(NEWEST),
        "plan": void.training.plan(),
        "run": None if run is None else show_run(void, run),
        "verdict": None if run is not None else undecided(void),
        "changes": _changes(void),
    }


def _changes(void: Void) -> int:
    return void.store.changes + void.files.changes


async def _events(request: Request) -> Response:
    found = loading(request)

    async def changes() -> AsyncIterator[str]:
        last_sent: Any = None
        for look in itertools.count(1):
            if found.closing:
                return
            void = found.void
            now: Any = look // LOOKS_WHILE_LOADING
            if void is not None:
                running = void.training.running
                now = (_changes(void), running, look // LOOKS_OF_A_RUN if running is not None else 0)
            if now != last_sent:
                last_sent = now
                yield event(await run_in_threadpool(_read_state, found))
            elif look % LOOKS_A_BEAT == 0:
                yield BEAT
            await asyncio.sleep(POLL_SECONDS)

    return event_stream(changes())


ROUTES = [
    Route("/api/state", _state, methods=["GET"]),
    Route("/api/events", _events, methods=["GET"]),
]
