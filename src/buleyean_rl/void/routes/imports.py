"""Imported files: looked at first, then taken.

POST /api/imports: the file as body; ?uid=, name=, and
     prompt=, answer=, score=, system=: columns of a table of its own (otherwise 400 offers them), below=
POST /api/imports/{uid}/take: store it; with again, also a file that was imported before (otherwise 409 says when)
POST /api/imports/{uid}/drop
GET  /api/imports: all of them
POST /api/imports/{id}/undo, /redo: all rejections of one
"""

from __future__ import annotations

import hashlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.data.importers.protocol import COLUMN_ROLES
from buleyean_rl.void.importing import Preview, UnreadableFile
from buleyean_rl.void.requests import (
    parse_flag,
    parse_text,
    parse_uid,
    path_id,
    path_uid,
    query_number,
    read_json,
)
from buleyean_rl.void.services import Void, in_thread, services
from buleyean_rl.void.store import ImportedFile, Row
from buleyean_rl.web.body import read_body

MAX_UPLOAD = 16 * 1024 * 1024  # bytes
MAX_NAME = 255  # characters
SHOWN = ("format", "records", "rejections", "notes", "sample", "columns")


async def _upload(request: Request) -> Response:
    void, query = services(request), request.query_params
    uid, name = parse_uid(query), parse_text(query, "name", MAX_NAME, default="")
    columns = {role: parse_text(query, role, MAX_NAME) for role in COLUMN_ROLES if query.get(role)}
    if columns and not {"prompt", "answer"} <= columns.keys():
        raise HTTPException(400, "name the columns of both the prompt and the answer")
    below = query_number(request, "below")
    content = await read_body(request, MAX_UPLOAD)
    file = ImportedFile(uid, hashlib.sha256(content).hexdigest(), name)
    async with void.one_import:
        try:
            preview = await in_thread(void.importer.read_upload, content, file, columns, below)
        except UnreadableFile as error:
            reply: Row = {"error": str(error)}
            reply |= {"columns": error.columns, "sample": error.sample} if error.columns else {}
            return JSONResponse(reply, status_code=400)
    return JSONResponse(await in_thread(_show, void, preview))


def _show(void: Void, preview: Preview) -> Row:
    shown = {name: getattr(preview, name) for name in SHOWN}
    earlier = void.store.imports.find_file(preview.file.sha256)
    return shown | {"uid": preview.file.uid, "name": preview.file.name, "earlier": earlier}


async def _take(request: Request) -> Response:
    void, uid, again = services(request), path_uid(request), parse_flag(await read_json(request), "again")

    def take() -> Response:
        stored = void.store.imports.find(uid)
        if stored is not None:  # sent again after a broken connection
            return JSONResponse(stored)
        preview = void.importer.preview(uid)
        if preview is None:
            raise HTTPException(404, "the file is not here any more: choose it again")
        earlier = void.store.imports.find_file(preview.file.sha256)
        if earlier is not None and not again:
            problem = f"this file was imported before, as {earlier['name'] or 'import'} {earlier['id']}"
            return JSONResponse({"error": problem, "earlier": earlier}, status_code=409)
        stored = void.store.imports.add(preview.file, preview.format, preview.records, preview.rows())
        void.importer.drop(uid)
        return JSONResponse(stored)

    async with void.one_import:
        reply: Response = await in_thread(take)
    return reply


async def _drop(request: Request) -> Response:
    await in_thread(services(request).importer.drop, path_uid(request))
    return JSONResponse({})


async def _list(request: Request) -> Response:
    return JSONResponse({"imports": await in_thread(services(request).store.imports.list)})


async def _undo(request: Request) -> Response:
    identity, undone = path_id(request), request.scope["path"].endswith("/undo")
    imports = services(request).store.imports
    await in_thread(imports.undo, identity, undone)
    return JSONResponse(await in_thread(imports.get, identity, missing="import"))


ROUTES = [
    Route("/api/imports", _list, methods=["GET"]),
    Route("/api/imports", _upload, methods=["POST"]),
    Route("/api/imports/{uid}/take", _take, methods=["POST"]),
    Route("/api/imports/{uid}/drop", _drop, methods=["POST"]),
    Route("/api/imports/{id}/undo", _undo, methods=["POST"]),
    Route("/api/imports/{id}/redo", _undo, methods=["POST"]),
]
