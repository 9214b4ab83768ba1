"""Imported files.

POST /api/import: the file as body; ?uid=, name=, and
         again=1 for a file that was imported before (otherwise 409 says when),
         prompt=, answer=, score=, system=: columns of a table of its own (otherwise 400 offers them), below=
GET  /api/imports: all of them
POST /api/imports/{id}/undo, /redo: all rejections of one
"""

from __future__ import annotations

import hashlib

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.data.importers.protocol import COLUMN_ROLES
from buleyean_rl.void.importing import UnreadableFile
from buleyean_rl.void.requests import parse_text, parse_uid, path_id, query_number, read_body
from buleyean_rl.void.services import Void, services
from buleyean_rl.void.store import ImportedFile, Row

MAX_UPLOAD = 16 * 1024 * 1024  # bytes
MAX_NAME = 255  # characters


async def _import(request: Request) -> Response:
    void, query = services(request), request.query_params
    uid, name = parse_uid(query), parse_text(query, "name", MAX_NAME, default="")
    columns = {role: parse_text(query, role, MAX_NAME) for role in COLUMN_ROLES if query.get(role)}
    if columns and not {"prompt", "answer"} <= columns.keys():
        raise HTTPException(400, "name the columns of both the prompt and the answer")
    below, again = query_number(request, "below"), query.get("again") == "1"
    content = await read_body(request, MAX_UPLOAD)
    file = ImportedFile(uid, hashlib.sha256(content).hexdigest(), name)
    async with void.one_import:
        earlier = await run_in_threadpool(_find_earlier, void, file)
        if earlier is not None and earlier["uid"] == uid:  # sent again after a broken connection
            return JSONResponse(earlier | {"notes": []})
        if earlier is not None and not again:
            problem = f"this file was imported before, as {earlier['name'] or 'import'} {earlier['id']}"
            return JSONResponse({"error": problem, "earlier": earlier}, status_code=409)
        try:
            return JSONResponse(await run_in_threadpool(_store, void, file, content, columns, below))
        except UnreadableFile as error:
            reply: Row = {"error": str(error)}
            reply |= {"columns": error.columns, "sample": error.sample} if error.columns else {}
            return JSONResponse(reply, status_code=400)


def _find_earlier(void: Void, file: ImportedFile) -> Row | None:
    return void.store.imports.find(file.uid) or void.store.imports.find_file(file.sha256)


def _store(void: Void, file: ImportedFile, content: bytes, columns: dict[str, str], below: float | None) -> Row:
    with void.importer.read_upload(content, file.name, columns, below) as upload:
        return void.store.imports.add(file, upload.format, upload.records, upload.rows) | {"notes": upload.notes}


async def _list(request: Request) -> Response:
    return JSONResponse({"imports": await run_in_threadpool(services(request).store.imports.list)})


async def _undo(request: Request) -> Response:
    identity, undone = path_id(request), request.scope["path"].endswith("/undo")
    if not await run_in_threadpool(services(request).store.imports.undo, identity, undone):
        raise HTTPException(404, "there is no such import")
    return JSONResponse({"id": identity})


ROUTES = [
    Route("/api/import", _import, methods=["POST"]),
    Route("/api/imports", _list, methods=["GET"]),
    Route("/api/imports/{id}/undo", _undo, methods=["POST"]),
    Route("/api/imports/{id}/redo", _undo, methods=["POST"]),
]
