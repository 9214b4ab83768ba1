"""Training runs.

POST /api/runs: train on all rejections
GET  /api/runs, /api/runs/{id}: with points, samples, card and verdict
POST /api/runs/{id}/stop: end it with what it has learnt; once more, at once and without
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.requests import parse_integer, parse_uid, path_id, read_json
from buleyean_rl.void.services import Void, services
from buleyean_rl.void.store import Row
from buleyean_rl.void.verdict import read_verdict

MAX_STEPS = 10_000


async def _list(request: Request) -> Response:
    void = services(request)
    runs = await run_in_threadpool(void.store.runs.list)
    return JSONResponse({"runs": [_for_page(void, run) for run in runs]})


async def _train(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, steps = parse_uid(body), parse_integer(body, "steps", 1, MAX_STEPS)
    if not await run_in_threadpool(void.store.rejections.count):
        raise HTTPException(409, "nothing is rejected yet")
    run = await run_in_threadpool(void.training.start, uid, steps)
    if run is None:
        raise HTTPException(409, "a run is under way")
    return JSONResponse({"id": run})


async def _run(request: Request) -> Response:
    void, identity = services(request), path_id(request)

    def read() -> Row | None:
        run = void.store.runs.get(identity)
        if run is None:
            return None
        folder = void.training.folder(run)
        card = folder / "README.md"
        text = card.read_text("utf-8") if card.exists() else ""
        return _for_page(void, run) | {"card": text, "verdict": read_verdict(folder)}

    run = await run_in_threadpool(read)
    if run is None:
        raise HTTPException(404, "there is no such run")
    return JSONResponse(run)


async def _stop(request: Request) -> Response:
    if not await run_in_threadpool(services(request).training.stop, path_id(request)):
        raise HTTPException(409, "the run is not under way")
    return JSONResponse({})


def _for_page(void: Void, run: Row) -> Row:
    """A run as it stands, without its folder."""
    return {name: value for name, value in void.training.describe(run).items() if name != "folder"}


ROUTES = [
    Route("/api/runs", _list, methods=["GET"]),
    Route("/api/runs", _train, methods=["POST"]),
    Route("/api/runs/{id}", _run, methods=["GET"]),
    Route("/api/runs/{id}/stop", _stop, methods=["POST"]),
]
