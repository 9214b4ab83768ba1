"""Questions to the models.

POST /api/questions: ask
GET  /api/questions/{uid}, /stream: the answers as they come
POST /api/questions/{uid}/reveal: who gave which answer
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.requests import UID, parse_flag, parse_text, parse_uid, read_json
from buleyean_rl.void.routes.state import BEAT, event, event_stream
from buleyean_rl.void.services import services
from buleyean_rl.void.store import Row

MAX_PROMPT = 8_000  # characters
POLL_SECONDS = 0.05  # between looks at answers under way
LOOKS_A_BEAT = 100  # after which a sign of life is sent


async def _ask(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, prompt, blind = parse_uid(body), parse_text(body, "prompt", MAX_PROMPT), parse_flag(body, "blind")
    if not prompt.strip():
        raise HTTPException(400, "ask something")
    slots = [(side, model.name) for side, model in void.answering.models.items()]
    if blind:
        random.shuffle(slots)

    def ask() -> Row:
        void.store.questions.add(uid, prompt, blind, slots)
        question = void.store.questions.get(uid)
        assert question is not None
        void.answering.answers_to(question)
        return _for_page(question)

    return JSONResponse(await run_in_threadpool(ask))


async def _question(request: Request) -> Response:
    return JSONResponse(_for_page(await _find(request)))


async def _reveal(request: Request) -> Response:
    question = await _find(request)
    await run_in_threadpool(services(request).store.questions.reveal, question["id"])
    return JSONResponse(_for_page(await _find(request)))


async def _stream(request: Request) -> Response:
    question = await _find(request)
    answers = await run_in_threadpool(services(request).answering.answers_to, question)

    async def pieces() -> AsyncIterator[str]:
        sent, open_slots = [0] * len(answers), set(range(len(answers)))
        for look in itertools.count(1):
            if look % LOOKS_A_BEAT == 0:
                yield BEAT
            for slot in sorted(open_slots):
                answer = answers[slot]
                done, text = answer.done, answer.text  # in this order: a finished answer does not grow
                if len(text) > sent[slot] or done:
                    piece: Row = {"slot": slot, "offset": sent[slot], "text": text[sent[slot] :], "done": done}
                    yield event(piece | ({"error": answer.error} if answer.error else {}))
                    sent[slot] = len(text)
                if done:
                    open_slots.discard(slot)
            if not open_slots:
                return
            await asyncio.sleep(POLL_SECONDS)

    return event_stream(pieces())


async def _find(request: Request) -> Row:
    uid = request.path_params["uid"]
    question = await run_in_threadpool(services(request).store.questions.get, uid) if UID.fullmatch(uid) else None
    if question is None:
        raise HTTPException(404, "there is no such question")
    return question


def _for_page(question: Row) -> Row:
    """A question as the page may see it: who answers a blind one is not told."""
    revealed = bool(question["revealed"])
    answers = [
        {name: answer[name] for name in ("slot", "text", "rejections")}
        | ({"side": answer["side"], "model": answer["model"]} if revealed else {})
        for answer in question["answers"]
    ]
    return {"id": question["id"], "prompt": question["prompt"], "revealed": revealed, "answers": answers}


ROUTES = [
    Route("/api/questions", _ask, methods=["POST"]),
    Route("/api/questions/{uid}", _question, methods=["GET"]),
    Route("/api/questions/{uid}/stream", _stream, methods=["GET"]),
    Route("/api/questions/{uid}/reveal", _reveal, methods=["POST"]),
]
