"""Files of a model, to take away.

GET  /api/runs/{id}/files: what there is and can be made, and the line for Ollama
POST /api/runs/{id}/files/{kind}: make it; /link: an address without a token, for ten minutes
GET  /download/{secret}/{name}
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.files import KINDS
from buleyean_rl.void.requests import path_id
from buleyean_rl.void.routes.runs import find_run
from buleyean_rl.void.services import Void, in_thread, services
from buleyean_rl.void.store import Row


async def _list(request: Request) -> Response:
    void, identity = services(request), path_id(request)

    def read() -> Row:
        run = _find(void, identity)
        files = void.files.list(run, void.training.folder(run))
        return {"files": files, "ollama": void.files.ollama(run)}

    return JSONResponse(await in_thread(read))


async def _make(request: Request) -> Response:
    void, identity, kind = services(request), path_id(request), _kind(request)

    def make() -> Row:
        run = _find(void, identity)
        folder = void.training.folder(run)
        void.files.make(run, folder, kind)
        return void.files.get(run, folder, kind)

    return JSONResponse(await in_thread(make))


async def _link(request: Request) -> Response:
    void, identity, kind = services(request), path_id(request), _kind(request)

    def link() -> Row:
        run = _find(void, identity)
        return {"url": void.files.link(run, void.training.folder(run), kind)}

    return JSONResponse(await in_thread(link))


async def _download(request: Request) -> Response:
    found = services(request).files.linked(request.path_params["secret"])
    if found is None:
        raise HTTPException(404, "the link has run out: download it from the page again")
    path, name = found
    return FileResponse(path, filename=name, media_type="application/octet-stream")


def _kind(request: Request) -> str:
    kind = request.path_params["kind"]
    if kind not in KINDS:
        raise HTTPException(404, "there is no such file")
    return str(kind)


def _find(void: Void, identity: int) -> Row:
    """A run that has a model."""
    run = find_run(void, identity)
    if void.models.problem(run):
        raise HTTPException(409, "the run has no model")
    return run


ROUTES = [
    Route("/api/runs/{id}/files", _list, methods=["GET"]),
    Route("/api/runs/{id}/files/{kind}", _make, methods=["POST"]),
    Route("/api/runs/{id}/files/{kind}/link", _link, methods=["POST"]),
    Route("/download/{secret}/{name}", _download, methods=["GET"]),
]
