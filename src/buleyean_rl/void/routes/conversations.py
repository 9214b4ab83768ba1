"""Conversations.

GET  /api/conversations: a page of them; ?q= words, before= changed earlier
GET  /api/conversations/{uid}: with its turns
POST /api/conversations/{uid}/delete, /restore
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.requests import parse_text, path_uid, query_number
from buleyean_rl.void.services import in_thread, services
from buleyean_rl.void.shown import show_turn
from buleyean_rl.void.store import Row

MAX_WORDS = 200  # characters


async def _list(request: Request) -> Response:
    store = services(request).store
    words, before = parse_text(request.query_params, "q", MAX_WORDS, ""), query_number(request, "before")
    return JSONResponse(await in_thread(store.conversations.page, words.strip(), before))


async def _conversation(request: Request) -> Response:
    void, uid = services(request), path_uid(request)

    def read() -> Row | None:
        found = void.store.conversations.get(uid)
        if found is None:
            return None
        turns = [show_turn(void.answering, turn) for turn in found["turns"]]
        last = turns[-1] if turns else None
        settings = None if last is None else last["settings"] | {"blind": last["blind"]}
        return found | {"turns": turns, "settings": settings}

    return JSONResponse(await in_thread(read, missing="conversation"))


async def _delete(request: Request) -> Response:
    uid, deleted = path_uid(request), request.scope["path"].endswith("/delete")
    await in_thread(services(request).store.conversations.delete, uid, deleted, missing="conversation")
    return JSONResponse({"id": uid})


ROUTES = [
    Route("/api/conversations", _list, methods=["GET"]),
    Route("/api/conversations/{uid}", _conversation, methods=["GET"]),
    Route("/api/conversations/{uid}/delete", _delete, methods=["POST"]),
    Route("/api/conversations/{uid}/restore", _delete, methods=["POST"]),
]
