"""Training runs.

POST /api/runs: train on all rejections
GET  /api/runs/{id}: with points, samples, card and verdict
POST /api/runs/{id}/stop: end it with what it has learnt; once more, at once and without
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.markdown import render
from buleyean_rl.void.requests import parse_integer, parse_uid, path_id, read_json
from buleyean_rl.void.services import Void, in_thread, services
from buleyean_rl.void.shown import show_run, show_sample
from buleyean_rl.void.store import Row

MAX_STEPS = 10_000


async def _train(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, steps = parse_uid(body), parse_integer(body, "steps", 1, MAX_STEPS) if "steps" in body else None

    def train() -> Row:
        if not void.store.rejections.count():
            raise HTTPException(409, "nothing is rejected yet")
        run = void.training.start(uid, steps)
        if run is None:
            raise HTTPException(409, "a run is under way")
        return shown_run(void, run)

    return JSONResponse(await in_thread(train))


async def _run(request: Request) -> Response:
    void, identity = services(request), path_id(request)

    def read() -> Row | None:
        run = void.store.runs.get(identity)
        if run is None:
            return None
        card = void.training.folder(run) / "README.md"
        text = card.read_text("utf-8").split("\n---\n", 1)[-1] if card.exists() else ""  # without its header
        samples = [show_sample(sample) for sample in run["samples"]]
        return show_run(void, run) | {
            "points": run["points"], "samples": samples, "card": text, "card_html": render(text),
        }  # fmt: skip

    return JSONResponse(await in_thread(read, missing="run"))


async def _stop(request: Request) -> Response:
    void, identity = services(request), path_id(request)
    if not await in_thread(void.training.stop, identity):
        raise HTTPException(409, "the run is not under way")
    return JSONResponse(await in_thread(shown_run, void, identity))


def find_run(void: Void, identity: int) -> Row:
    """A run as the store has it."""
    run = void.store.runs.get(identity)
    if run is None:
        raise HTTPException(404, "there is no such run")
    return run


def shown_run(void: Void, identity: int) -> Row:
    """A run as it is shown."""
    return show_run(void, find_run(void, identity))


ROUTES = [
    Route("/api/runs", _train, methods=["POST"]),
    Route("/api/runs/{id}", _run, methods=["GET"]),
    Route("/api/runs/{id}/stop", _stop, methods=["POST"]),
]
