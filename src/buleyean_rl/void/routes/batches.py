"""Many prompts, answered in the background and judged one by one.

POST /api/batches: prompts; /prompts: those of a file, to look at
GET  /api/batches, /api/batches/{uid}
POST /api/batches/{uid}/stop, /resume, /delete
GET  /api/batches/{uid}/cards: ?from= position, count=
GET  /api/batches/{uid}/next: the first without a verdict
POST /api/turns/{uid}/verdict
"""

from __future__ import annotations

from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.requests import (
    parse_integer,
    parse_list,
    parse_spans,
    parse_text,
    parse_uid,
    path_uid,
    query_integer,
    read_json,
)
from buleyean_rl.void.routes.imports import MAX_NAME, MAX_UPLOAD
from buleyean_rl.void.routes.rejections import MAX_REASON, check_finished
from buleyean_rl.void.routes.turns import MAX_PROMPT, choose_slots, parse_prompt, parse_settings
from buleyean_rl.void.services import in_thread, services
from buleyean_rl.void.shown import show_turn
from buleyean_rl.void.store import Row
from buleyean_rl.void.store.batches import FINE, REJECTED, SKIPPED
from buleyean_rl.web.body import read_body

MAX_PROMPTS, MAX_CARDS = 2_000, 50
ANSWER_TOKENS = 256


async def _add(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, name = parse_uid(body), parse_text(body, "name", MAX_NAME, default="").strip()
    prompts = [parse_prompt({"prompts": each}, "prompts") for each in parse_list(body, "prompts", str, MAX_PROMPTS)]
    settings = parse_settings(body, ANSWER_TOKENS)

    def add() -> Row:
        slots = choose_slots(void, body, settings.blind, one=True)
        hidden = replace(settings, blind=settings.blind and len(slots) > 1)
        return void.store.batches.add(uid, name or prompts[0][:MAX_NAME], prompts, hidden, slots)

    return JSONResponse(await in_thread(add))


async def _prompts(request: Request) -> Response:
    void, name = services(request), parse_text(request.query_params, "name", MAX_NAME, default="")
    content = await read_body(request, MAX_UPLOAD)
    async with void.one_import:
        found = await in_thread(void.importer.read_prompts, content, name)
    prompts = [prompt for prompt in found if prompt.strip() and len(prompt) <= MAX_PROMPT]
    dropped = {"are empty or too long": len(found) - len(prompts), "are more than fit": len(prompts) - MAX_PROMPTS}
    notes = [f"{number:,} prompts are left out: they {why}" for why, number in dropped.items() if number > 0]
    return JSONResponse({"prompts": prompts[:MAX_PROMPTS], "notes": notes})


async def _list(request: Request) -> Response:
    return JSONResponse({"batches": await in_thread(services(request).store.batches.all)})


async def _batch(request: Request) -> Response:
    store, uid = services(request).store, path_uid(request)
    return JSONResponse(await in_thread(store.batches.get, uid, missing="batch"))


async def _change(request: Request) -> Response:
    store, uid, action = services(request).store, path_uid(request), request.scope["path"].rsplit("/", 1)[-1]
    paused, deleted = action == "stop", action == "delete"
    await in_thread(lambda: store.batches.set(uid, paused=paused, deleted=deleted), missing="batch")
    return JSONResponse({"id": uid} if deleted else await in_thread(store.batches.get, uid, missing="batch"))


async def _cards(request: Request) -> Response:
    void, uid = services(request), path_uid(request)
    start, count = query_integer(request, "from", 6), query_integer(request, "count", 2) or 1

    def read() -> Row:
        cards = void.store.batches.cards(uid, start, min(count, MAX_CARDS))
        return {"cards": [show_turn(void.answering, card) for card in cards]}

    await in_thread(void.store.batches.get, uid, missing="batch")
    return JSONResponse(await in_thread(read))


async def _next(request: Request) -> Response:
    void, uid = services(request), path_uid(request)

    def read() -> Row:
        found = void.store.batches.next(uid)
        return found | {"card": found["card"] and show_turn(void.answering, found["card"])}

    await in_thread(void.store.batches.get, uid, missing="batch")
    return JSONResponse(await in_thread(read))


async def _judge(request: Request) -> Response:
    void, uid, body = services(request), path_uid(request), await read_json(request)
    name, verdict, slot = parse_uid(body), body.get("verdict"), parse_integer(body, "slot", 0, 1, default=0)
    spans, reason = parse_spans(body), parse_text(body, "reason", MAX_REASON, default="")
    if verdict not in (REJECTED, FINE, SKIPPED, None):
        raise HTTPException(400, f"verdict must be {REJECTED}, {FINE}, {SKIPPED} or null")

    def judge() -> Row:
        turn = void.store.conversations.turn(uid)
        if turn is None or turn["batch"] is None or slot >= len(turn["answers"]):
            raise HTTPException(404, "there is no such card")
        if verdict in (REJECTED, FINE):
            check_finished(turn["answers"][slot])
        said = {"spans": spans, "reason": reason} if verdict == REJECTED else {}
        return show_turn(void.answering, void.store.batches.judge(turn, name, verdict, slot, **said))

    return JSONResponse(await in_thread(judge))


ROUTES = [
    Route("/api/batches", _list, methods=["GET"]),
    Route("/api/batches", _add, methods=["POST"]),
    Route("/api/batches/prompts", _prompts, methods=["POST"]),
    Route("/api/batches/{uid}", _batch, methods=["GET"]),
    Route("/api/batches/{uid}/stop", _change, methods=["POST"]),
    Route("/api/batches/{uid}/resume", _change, methods=["POST"]),
    Route("/api/batches/{uid}/delete", _change, methods=["POST"]),
    Route("/api/batches/{uid}/cards", _cards, methods=["GET"]),
    Route("/api/batches/{uid}/next", _next, methods=["GET"]),
    Route("/api/turns/{uid}/verdict", _judge, methods=["POST"]),
]
