"""Models: what runs have become.

GET  /api/models: the base, and all runs
POST /api/pair: who answers
POST /api/runs/{id}/name, /keep, /back, /delete
"""

from __future__ import annotations

import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.models import BASE, key_of
from buleyean_rl.void.requests import parse_list, parse_text, path_id, read_json
from buleyean_rl.void.routes.runs import find_run, shown_run
from buleyean_rl.void.services import Void, in_thread, services
from buleyean_rl.void.shown import show_pair, show_runs
from buleyean_rl.void.store import Row
from buleyean_rl.void.store.runs import BACK, KEPT, UNFINISHED

MAX_NAME = 80  # characters


async def _list(request: Request) -> Response:
    void = services(request)
    base = {"model": BASE, "name": void.models.base_name}
    return JSONResponse({"base": base, "runs": await in_thread(show_runs, void)})


async def _choose(request: Request) -> Response:
    void, keys = services(request), parse_list(await read_json(request), "models", str, 2)
    await in_thread(void.models.set_pair, keys)
    return JSONResponse({"pair": await in_thread(show_pair, void)})


async def _name(request: Request) -> Response:
    void, identity = services(request), path_id(request)
    name = " ".join(parse_text(await read_json(request), "name", MAX_NAME).split())
    if not name or not name.isprintable():
        raise HTTPException(400, f"a name has 1 to {MAX_NAME} letters and signs, on one line")
    return JSONResponse(await in_thread(_set, void, identity, {"name": name}))


async def _keep(request: Request) -> Response:
    return JSONResponse(await in_thread(_set, services(request), path_id(request), {"decision": KEPT}))


async def _back(request: Request) -> Response:
    void, identity = services(request), path_id(request)

    def go_back() -> Row:
        run = _find_ended(void, identity)
        before = [key for key in json.loads(run["pair_before"] or "null") or [BASE] if key != key_of(identity)]
        void.models.set_pair([key for key in before if _is_usable(void, key)] or [BASE])
        return _set(void, identity, {"decision": BACK})

    return JSONResponse(await in_thread(go_back))


async def _delete(request: Request) -> Response:
    void, identity = services(request), path_id(request)

    def delete() -> Row:
        run = _find_ended(void, identity)
        void.files.delete(identity)
        void.models.close(key_of(identity))
        void.store.runs.delete(identity)
        void.training.remove(run)
        return {"id": identity}

    return JSONResponse(await in_thread(delete))


def _set(void: Void, identity: int, values: Row) -> Row:
    void.store.runs.set(identity, **values)
    return shown_run(void, identity)


def _find_ended(void: Void, identity: int) -> Row:
    run = find_run(void, identity)
    if identity == void.training.running or void.training.describe(run)["state"] in UNFINISHED:
        raise HTTPException(409, "the run is under way: stop it first")
    return run


def _is_usable(void: Void, key: str) -> bool:
    run = None if key == BASE else void.store.runs.get(int(key.removeprefix("run-")))
    return key == BASE or (run is not None and not void.models.problem(run))


ROUTES = [
    Route("/api/models", _list, methods=["GET"]),
    Route("/api/pair", _choose, methods=["POST"]),
    Route("/api/runs/{id}/name", _name, methods=["POST"]),
    Route("/api/runs/{id}/keep", _keep, methods=["POST"]),
    Route("/api/runs/{id}/back", _back, methods=["POST"]),
    Route("/api/runs/{id}/delete", _delete, methods=["POST"]),
]
