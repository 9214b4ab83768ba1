"""Rejections by people.

POST /api/rejections: reject an answer or a part of it
GET  /api/rejections: a page of them; ?page=, q= words
POST /api/rejections/{id}/reason, /undo, /redo
POST /api/rejections/reason, /undo, /redo: of several
GET  /api/export: all as a records file
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.data.records import format_record
from buleyean_rl.void.requests import (
    parse_integer,
    parse_list,
    parse_spans,
    parse_text,
    parse_uid,
    path_id,
    query_integer,
    read_json,
)
from buleyean_rl.void.routes.conversations import MAX_WORDS
from buleyean_rl.void.services import Void, in_thread, services
from buleyean_rl.void.shown import show_answer_of
from buleyean_rl.void.store import MAX_INTEGER, Row
from buleyean_rl.void.store.history import READABLE

MAX_REASON = 1_000  # characters
MAX_CHOSEN = 1_000  # at once


async def _reject(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, identity = parse_uid(body), parse_integer(body, "answer", 0, MAX_INTEGER)
    spans, reason = parse_spans(body), parse_text(body, "reason", MAX_REASON, default="")

    def reject() -> Row:
        answer = find_finished(void, identity)
        added = void.store.rejections.add(uid, answer, spans, reason)
        return added | {"answer": show_answer_of(void, identity)}

    return JSONResponse(await in_thread(reject))


async def _set_reason(request: Request) -> Response:
    identity, body = path_id(request), await read_json(request)
    reason = parse_text(body, "reason", MAX_REASON)
    if not await in_thread(services(request).store.rejections.set_reason, [identity], reason):
        raise HTTPException(404, "there is no such rejection")
    return JSONResponse({"id": identity})


async def _undo(request: Request) -> Response:
    void, identity, body = services(request), path_id(request), await read_json(request)
    undone, shown = _is_undo(request), parse_integer(body, "answer", 0, MAX_INTEGER) if "answer" in body else None
    if not await in_thread(void.store.rejections.undo, [identity], undone):
        raise HTTPException(404, "there is no such rejection")
    answer = {} if shown is None else {"answer": await in_thread(show_answer_of, void, shown)}
    return JSONResponse({"id": identity} | answer)


async def _set_reasons(request: Request) -> Response:
    body = await read_json(request)
    chosen, reason = parse_list(body, "ids", int, MAX_CHOSEN), parse_text(body, "reason", MAX_REASON)
    changed = await in_thread(services(request).store.rejections.set_reason, chosen, reason)
    return JSONResponse({"changed": changed})


async def _undo_several(request: Request) -> Response:
    chosen = parse_list(await read_json(request), "ids", int, MAX_CHOSEN)
    changed = await in_thread(services(request).store.rejections.undo, chosen, _is_undo(request))
    return JSONResponse({"changed": changed})


async def _list(request: Request) -> Response:
    page = query_integer(request, "page", max_digits=6)
    words = parse_text(request.query_params, "q", MAX_WORDS, default="").strip()
    return JSONResponse(await in_thread(services(request).store.rejections.page, page, words))


async def _export(request: Request) -> Response:
    def lines() -> bytes:
        return "".join(format_record(record) + "\n" for record in services(request).store.rejections.records()).encode()

    headers = {"Content-Disposition": 'attachment; filename="records.jsonl"'}
    return Response(await in_thread(lines), media_type="application/x-ndjson", headers=headers)


def find_finished(void: Void, identity: int) -> Row:
    """An answer that may be rejected."""
    answer = void.store.conversations.answer(identity)
    if answer is None:
        raise HTTPException(404, "there is no such answer")
    check_finished(answer)
    return answer


def check_finished(answer: Row) -> None:
    """Refuse an answer that is still being written, or failed."""
    if answer["state"] not in READABLE:
        raise HTTPException(409, "the answer is not finished yet")


def _is_undo(request: Request) -> bool:
    return str(request.scope["path"]).endswith("/undo")


ROUTES = [
    Route("/api/rejections", _list, methods=["GET"]),
    Route("/api/rejections", _reject, methods=["POST"]),
    Route("/api/rejections/reason", _set_reasons, methods=["POST"]),
    Route("/api/rejections/undo", _undo_several, methods=["POST"]),
    Route("/api/rejections/redo", _undo_several, methods=["POST"]),
    Route("/api/rejections/{id}/reason", _set_reason, methods=["POST"]),
    Route("/api/rejections/{id}/undo", _undo, methods=["POST"]),
    Route("/api/rejections/{id}/redo", _undo, methods=["POST"]),
    Route("/api/export", _export, methods=["GET"]),
]
