"""Turns of conversations, and their answers.

POST /api/turns: ask
GET  /api/turns/{uid}, /stream: the answers as they come
POST /api/turns/{uid}/stop, /reveal
POST /api/answers/{id}/again, /continue
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from buleyean_rl.void.requests import (
    parse_flag,
    parse_integer,
    parse_list,
    parse_number,
    parse_text,
    parse_uid,
    path_id,
    path_uid,
    read_json,
)
from buleyean_rl.void.routes.events import BEAT, event, event_stream
from buleyean_rl.void.services import Void, in_thread, loading, services
from buleyean_rl.void.shown import show_answer, show_turn
from buleyean_rl.void.store import Row, TurnSettings
from buleyean_rl.void.store.conversations import UNFINISHED, Slots

MAX_PROMPT = 8_000  # characters
MAX_ANSWER_TOKENS = 4_096
POLL_SECONDS = 0.1  # between looks at answers under way
LOOKS_A_BEAT = 50  # after which a sign of life is sent


async def _ask(request: Request) -> Response:
    void, body = services(request), await read_json(request)
    uid, conversation = parse_uid(body), parse_uid(body, "conversation")
    prompt, settings = parse_prompt(body, "prompt"), parse_settings(body, 512)

    def ask() -> Row:
        slots = choose_slots(void, body, settings.blind)
        if not void.store.conversations.ask(uid, conversation, prompt, settings, slots):
            raise HTTPException(409, "an answer is still being written: stop it, or wait")
        return _write(void, uid)

    return JSONResponse(await in_thread(ask))


async def _turn(request: Request) -> Response:
    void, uid = services(request), path_uid(request)
    turn = await in_thread(void.store.conversations.turn, uid, missing="turn")
    return JSONResponse(await in_thread(show_turn, void.answering, turn))


async def _stream(request: Request) -> Response:
    found, void, uid = loading(request), services(request), path_uid(request)
    turn = await in_thread(void.store.conversations.turn, uid, missing="turn")

    def read() -> list[Row]:
        now = void.store.conversations.turn(uid) or turn
        return [show_answer(void.answering, answer, bool(now["revealed"])) for answer in now["answers"]]

    def look() -> Any:
        """What tells whether something is new, without a look into the store."""
        partials = [void.answering.partial(answer["id"]) for answer in turn["answers"]]
        return [partial and (len(partial.text), partial.state) for partial in partials]

    async def pieces() -> AsyncIterator[str]:
        sent: dict[int, Row] = {}
        seen: Any = None
        for number in itertools.count(1):
            if found.closing:
                return
            if number % LOOKS_A_BEAT == 0:
                yield BEAT
            now = look()
            if now != seen or number % LOOKS_A_BEAT == 0:
                seen, answers = now, await in_thread(read)
                for answer in answers:
                    if sent.get(answer["slot"]) != answer:
                        yield event(answer)
                        sent[answer["slot"]] = answer
                if not any(answer["state"] in UNFINISHED for answer in answers):
                    return
            await asyncio.sleep(POLL_SECONDS)

    return event_stream(pieces())


async def _stop_turn(request: Request) -> Response:
    void, uid = services(request), path_uid(request)
    turn = await in_thread(void.store.conversations.turn, uid, missing="turn")
    for answer in turn["answers"]:
        void.answering.stop(answer["id"])
    await _ended(void, turn["answers"])
    return JSONResponse(await in_thread(_show, void, uid))


async def _reveal(request: Request) -> Response:
    void, uid = services(request), path_uid(request)
    await in_thread(void.store.conversations.turn, uid, missing="turn")
    await in_thread(void.store.conversations.reveal, uid)
    return JSONResponse(await in_thread(_show, void, uid))


async def _again(request: Request) -> Response:
    void, answer = services(request), await _find_answer(request)
    if answer["state"] in UNFINISHED:
        raise HTTPException(409, "the answer is being written: stop it first")

    def again() -> Row:
        void.store.conversations.again(answer)
        return _write(void, answer["turn"])

    return JSONResponse(await in_thread(again))


async def _continue(request: Request) -> Response:
    void, answer = services(request), await _find_answer(request)
    if answer["state"] not in ("cut", "stopped"):
        raise HTTPException(409, "only an answer that was cut or stopped goes on")
    if answer["rejections"]:
        raise HTTPException(409, "undo its rejection first")

    def go_on() -> Row:
        void.store.conversations.wait(answer["id"])
        return _write(void, answer["turn"])

    return JSONResponse(await in_thread(go_on))


def parse_prompt(values: Mapping[str, Any], name: str) -> str:
    """A question, which has words."""
    prompt = parse_text(values, name, MAX_PROMPT)
    if not prompt.strip():
        raise HTTPException(400, "ask something")
    return prompt


def parse_settings(body: Row, max_tokens: int) -> TurnSettings:
    """How a turn is to be answered."""
    return TurnSettings(
        system=parse_text(body, "system", MAX_PROMPT, default="").strip(),
        temperature=parse_number(body, "temperature", 0, 2, default=0),
        max_tokens=parse_integer(body, "max_tokens", 1, MAX_ANSWER_TOKENS, default=max_tokens),
        blind=parse_flag(body, "blind"),
    )


def choose_slots(void: Void, body: Row, blind: bool, one: bool = False) -> Slots:
    """Who answers: the models that are named, else the pair or its right one; shuffled where nobody is to know."""
    if "models" in body:
        keys = parse_list(body, "models", str, 2)
        if len(set(keys)) < len(keys):
            raise HTTPException(400, "models must be different")
        for key in keys:
            void.models.get(key)
    else:
        keys = void.models.pair[-1:] if one else void.models.pair
    slots = void.models.slots(keys)
    if blind:
        random.shuffle(slots)
    return slots


def _write(void: Void, uid: str) -> Row:
    """Write a turn's answers that wait; returns the turn as it is shown."""
    turn = void.store.conversations.turn(uid)
    assert turn is not None
    waiting = [
        answer | {"max_tokens": turn["max_tokens"]} for answer in turn["answers"] if answer["state"] == "waiting"
    ]
    if turn["batch"] is None:
        void.answering.write(waiting)
    return _show(void, uid)


def _show(void: Void, uid: str) -> Row:
    turn = void.store.conversations.turn(uid)
    assert turn is not None
    return show_turn(void.answering, turn)


async def _find_answer(request: Request) -> Row:
    identity = path_id(request)
    found: Row = await in_thread(services(request).store.conversations.answer, identity, missing="answer")
    return found


async def _ended(void: Void, answers: list[Row]) -> None:
    """Wait until answers that were told to stop are stored: a piece of one takes as long as a token."""
    for _ in range(100):
        if not any(void.answering.partial(answer["id"]) for answer in answers):
            return
        await asyncio.sleep(POLL_SECONDS / 2)


ROUTES = [
    Route("/api/turns", _ask, methods=["POST"]),
    Route("/api/turns/{uid}", _turn, methods=["GET"]),
    Route("/api/turns/{uid}/stream", _stream, methods=["GET"]),
    Route("/api/turns/{uid}/stop", _stop_turn, methods=["POST"]),
    Route("/api/turns/{uid}/reveal", _reveal, methods=["POST"]),
    Route("/api/answers/{id}/again", _again, methods=["POST"]),
    Route("/api/answers/{id}/continue", _continue, methods=["POST"]),
]
