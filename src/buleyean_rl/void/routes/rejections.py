"""Rejections by people.

POST /api/rejections: reject an answer or a part of it
GET  /api/rejections: a page of them
POST /api/rejections/{id}/reason, /undo, /redo
GET  /api/export: all as a records file
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.data.records import format_record
from buleyean_rl.void.requests import (
    parse_integer,
    parse_spans,
    parse_text,
    parse_uid,
    path_id,
    query_integer,
    read_json,
)
from buleyean_rl.void.services import services

MAX_REASON = 1_000  # characters


async def _reject(request: Request) -> Response:
    store, body = services(request).store, await read_json(request)
    uid, key = parse_uid(body), parse_uid(body, "question")
    slot, spans = parse_integer(body, "slot", 0, 1), parse_spans(body)
    reason = parse_text(body, "reason", MAX_REASON, default="")
    question = await run_in_threadpool(store.questions.get, key)
    if question is None or slot >= len(question["answers"]):
        raise HTTPException(404, "there is no such answer")
    text = question["answers"][slot]["text"]
    if text is None:
        raise HTTPException(409, "the answer is not finished yet")
    added = await run_in_threadpool(
        store.rejections.add, uid, question["prompt"], text, spans, reason, "page", (key, slot)
    )
    return JSONResponse(added)


async def _set_reason(request: Request) -> Response:
    identity, body = path_id(request), await read_json(request)
    reason = parse_text(body, "reason", MAX_REASON)
    if not await run_in_threadpool(services(request).store.rejections.set_reason, identity, reason):
        raise HTTPException(404, "there is no such rejection")
    return JSONResponse({"id": identity})


async def _undo(request: Request) -> Response:
    identity, undone = path_id(request), request.scope["path"].endswith("/undo")
    if not await run_in_threadpool(services(request).store.rejections.undo, identity, undone):
        raise HTTPException(404, "there is no such rejection")
    return JSONResponse({"id": identity})


async def _list(request: Request) -> Response:
    page = query_integer(request, "page", max_digits=6)
    return JSONResponse(await run_in_threadpool(services(request).store.rejections.page, page))


async def _export(request: Request) -> Response:
    def lines() -> bytes:
        return "".join(format_record(record) + "\n" for record in services(request).store.rejections.records()).encode()

    headers = {"Content-Disposition": 'attachment; filename="records.jsonl"'}
    return Response(await run_in_threadpool(lines), media_type="application/x-ndjson", headers=headers)


ROUTES = [
    Route("/api/rejections", _list, methods=["GET"]),
    Route("/api/rejections", _reject, methods=["POST"]),
    Route("/api/rejections/{id}/reason", _set_reason, methods=["POST"]),
    Route("/api/rejections/{id}/undo", _undo, methods=["POST"]),
    Route("/api/rejections/{id}/redo", _undo, methods=["POST"]),
    Route("/api/export", _export, methods=["GET"]),
]
