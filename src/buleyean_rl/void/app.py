"""The page's interface over HTTP: JSON in and out, and two streams of events.

    /                     the page
    /api/state            models, counts, the run under way
    /api/questions        ask; /stream its answers, as they come
    /api/rejections       reject, give a reason, undo, list
    /api/export, import   records out and in
    /api/runs             train, stop, list

State that must not be lost is the store's, never this module's.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from buleyean_rl.data.importers import import_records
from buleyean_rl.data.records import format_record, read_records
from buleyean_rl.errors import BuleyeanError, RecordError
from buleyean_rl.void.access import AccessControl
from buleyean_rl.void.answering import Answering
from buleyean_rl.void.store import Row, Store
from buleyean_rl.void.training import Training

PAGE = Path(__file__).parent / "page"
MAX_PROMPT = 8_000  # characters
MAX_REASON = 1_000
MAX_BODY = 256 * 1024  # bytes
MAX_UPLOAD = 16 * 1024 * 1024
MAX_STEPS = 10_000
POLL_SECONDS = 0.05  # between looks at answers under way
UID = re.compile(r"[A-Za-z0-9-]{8,64}")


@dataclass(frozen=True)
class Void:
    """What the page works on.

    Args:
        store: of everything that happened.
        answering: the models.
        training: the run under way, if any.
    """

    store: Store
    answering: Answering
    training: Training


def make_app(void: Void, *, token: str | None, hosts: frozenset[str] | None, on_shutdown: Callable[[], None]) -> Any:
    """The application, guarded.

    Args:
        void: what it works on.
        token: must be shown to `/api`; None for nobody but this machine.
        hosts: names under which the page may be asked for; None for any.
        on_shutdown: called at the end.
    """
    routes = [
        Route("/", _page("index.html")),
        *(Route(f"/{name}", _page(name)) for name in ("app.js", "chart.js", "style.css")),
        Route("/api/state", _Api(void, _state), methods=["GET"]),
        Route("/api/events", _Api(void, _events), methods=["GET"]),
        Route("/api/questions", _Api(void, _ask), methods=["POST"]),
        Route("/api/questions/{uid}", _Api(void, _question), methods=["GET"]),
        Route("/api/questions/{uid}/stream", _Api(void, _stream), methods=["GET"]),
        Route("/api/questions/{uid}/reveal", _Api(void, _reveal), methods=["POST"]),
        Route("/api/rejections", _Api(void, _rejections), methods=["GET"]),
        Route("/api/rejections", _Api(void, _reject), methods=["POST"]),
        Route("/api/rejections/{id:int}/{what}", _Api(void, _change_rejection), methods=["POST"]),
        Route("/api/export", _Api(void, _export), methods=["GET"]),
        Route("/api/import", _Api(void, _import), methods=["POST"]),
        Route("/api/runs", _Api(void, _runs), methods=["GET"]),
        Route("/api/runs", _Api(void, _train), methods=["POST"]),
        Route("/api/runs/{id:int}", _Api(void, _run), methods=["GET"]),
        Route("/api/runs/{id:int}/stop", _Api(void, _stop), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused, BuleyeanError: _failed})
    return AccessControl(app, token=token, hosts=hosts, on_shutdown=on_shutdown)


class _Api:
    """A route's endpoint: a function of what the page works on and the request."""

    def __init__(self, void: Void, answer: Callable[[Void, Request], Awaitable[Response]]) -> None:
        self._void, self._answer = void, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        response = await self._answer(self._void, Request(scope, receive))
        await response(scope, receive, send)


def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(_request: Request) -> Response:
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return serve


async def _state(void: Void, _request: Request) -> Response:
    return JSONResponse(await run_in_threadpool(_read_state, void))


def _read_state(void: Void) -> Row:
    run = void.store.run(void.training.running) if void.training.running is not None else None
    if run is not None:
        run = {name: run[name] for name in ("id", "state", "steps", "records")} | {"points": run["points"][-1:]}
    models = {side: model.name for side, model in void.answering.models.items()}
    return {"models": models, "rejections": void.store.count(), "running": run, "changes": void.store.changes}


async def _events(void: Void, _request: Request) -> Response:
    async def changes() -> AsyncIterator[str]:
        last_sent: Any = None
        while True:
            now = (void.store.changes, len(void.answering.models), void.training.running)
            if now != last_sent:
                last_sent = now
                yield _event(await run_in_threadpool(_read_state, void))
            await asyncio.sleep(POLL_SECONDS * 4)

    return _event_stream(changes())


async def _ask(void: Void, request: Request) -> Response:
    body = await _json(request)
    uid, prompt, blind = _uid(body), _text(body, "prompt", MAX_PROMPT), bool(body.get("blind"))
    if not prompt.strip():
        raise HTTPException(400, "ask something")
    slots = [(side, model.name) for side, model in void.answering.models.items()]
    if blind:
        random.shuffle(slots)

    def ask() -> Row:
        void.store.add_question(uid, prompt, blind, slots)
        question = void.store.question(uid)
        assert question is not None
        void.answering.answers_to(question)
        return _for_page(question)

    return JSONResponse(await run_in_threadpool(ask))


async def _question(void: Void, request: Request) -> Response:
    return JSONResponse(_for_page(await _find_question(void, request)))


async def _reveal(void: Void, request: Request) -> Response:
    question = await _find_question(void, request)
    await run_in_threadpool(void.store.reveal, question["id"])
    return JSONResponse(_for_page(await _find_question(void, request)))


async def _stream(void: Void, request: Request) -> Response:
    question = await _find_question(void, request)
    answers = await run_in_threadpool(void.answering.answers_to, question)

    async def pieces() -> AsyncIterator[str]:
        sent, open_slots = [0] * len(answers), set(range(len(answers)))
        while open_slots:
            for slot in sorted(open_slots):
                answer = answers[slot]
                done, text = answer.done, answer.text  # in this order: a finished answer does not grow
                if len(text) > sent[slot] or done:
                    event: Row = {"slot": slot, "offset": sent[slot], "text": text[sent[slot] :], "done": done}
                    yield _event(event | ({"error": answer.error} if answer.error else {}))
                    sent[slot] = len(text)
                if done:
                    open_slots.discard(slot)
            await asyncio.sleep(POLL_SECONDS)

    return _event_stream(pieces())


async def _reject(void: Void, request: Request) -> Response:
    body = await _json(request)
    uid, slot, reason = _uid(body), _integer(body, "slot", 0, 1), _text(body, "reason", MAX_REASON, default="")
    spans = body.get("spans", [])
    question = await run_in_threadpool(void.store.question, str(body.get("question")))
    if question is None or slot >= len(question["answers"]):
        raise HTTPException(404, "there is no such answer")
    text = question["answers"][slot]["text"]
    if text is None:
        raise HTTPException(409, "the answer is not finished yet")
    try:
        where = question["id"], slot
        identity = await run_in_threadpool(
            void.store.reject, uid, question["prompt"], text, spans, reason, "page", where
        )
    except RecordError as error:
        raise HTTPException(400, str(error)) from error
    return JSONResponse({"id": identity})


async def _change_rejection(void: Void, request: Request) -> Response:
    identity, what = request.path_params["id"], request.path_params["what"]
    body = await _json(request)
    if what == "reason":
        reason = _text(body, "reason", MAX_REASON)
        exists = await run_in_threadpool(void.store.set_reason, identity, reason)
    elif what in ("undo", "redo"):
        exists = await run_in_threadpool(void.store.undo, identity, what == "undo")
    else:
        exists = False
    if not exists:
        raise HTTPException(404, "there is no such rejection")
    return JSONResponse({"id": identity})


async def _rejections(void: Void, request: Request) -> Response:
    page = request.query_params.get("page", "0")
    if not re.fullmatch(r"\d{1,6}", page):
        raise HTTPException(400, "a page is a whole number")
    return JSONResponse(await run_in_threadpool(void.store.rejections, int(page)))


async def _export(void: Void, _request: Request) -> Response:
    records = await run_in_threadpool(void.store.records)
    lines = "".join(format_record(record) + "\n" for record in records)
    headers = {"Content-Disposition": 'attachment; filename="records.jsonl"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)


async def _import(void: Void, request: Request) -> Response:
    uid = _uid(request.query_params)
    raw = await _body(request, MAX_UPLOAD)
    suffix = Path(request.query_params.get("name", "")).suffix.lower()
    suffix = suffix if suffix in (".json", ".csv", ".tsv") else ".jsonl"

    def store_upload() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / f"upload{suffix}", Path(folder) / "records"
            source.write_bytes(raw)
            try:
                report = import_records(str(source), output)
                count = void.store.import_records(uid, list(read_records(output)), "import")
            except RecordError as error:
                where = f"line {error.line}: " if error.line is not None else ""
                raise HTTPException(400, where + error.problem) from error
        return {"rejections": count, "records": report.records, "format": report.format}

    return JSONResponse(await run_in_threadpool(store_upload))


async def _runs(void: Void, _request: Request) -> Response:
    return JSONResponse({"runs": [_without_folder(run) for run in await run_in_threadpool(void.store.runs)]})


async def _train(void: Void, request: Request) -> Response:
    body = await _json(request)
    uid, steps = _uid(body), _integer(body, "steps", 1, MAX_STEPS)
    if not await run_in_threadpool(void.store.count):
        raise HTTPException(409, "nothing is rejected yet")
    run = await run_in_threadpool(void.training.start, uid, steps)
    if run is None:
        raise HTTPException(409, "a run is under way")
    return JSONResponse({"id": run})


async def _run(void: Void, request: Request) -> Response:
    run = await run_in_threadpool(void.store.run, request.path_params["id"])
    if run is None:
        raise HTTPException(404, "there is no such run")
    card = Path(run["folder"]) / "README.md"
    text = await run_in_threadpool(card.read_text, "utf-8") if card.exists() else ""
    return JSONResponse(_without_folder(run) | {"card": text})


async def _stop(void: Void, request: Request) -> Response:
    if not await run_in_threadpool(void.training.stop, request.path_params["id"]):
        raise HTTPException(409, "the run is not under way")
    return JSONResponse({})


async def _find_question(void: Void, request: Request) -> Row:
    question = await run_in_threadpool(void.store.question, request.path_params["uid"])
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


def _without_folder(run: Row) -> Row:
    return {name: value for name, value in run.items() if name != "folder"}


def _event(value: Row) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _event_stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _body(request: Request, max_bytes: int) -> bytes:
    """A request's body, read no further than the limit."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > max_bytes:
            raise HTTPException(413, f"too large: {max_bytes // 1024:,} KB at most")
        parts.append(part)
    return b"".join(parts)


async def _json(request: Request) -> Row:
    raw = await _body(request, MAX_BODY)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HTTPException(400, "expected a JSON object")
    return value


def _uid(body: Any) -> str:
    uid = body.get("uid")
    if not isinstance(uid, str) or not UID.fullmatch(uid):
        raise HTTPException(400, "uid must be 8 to 64 letters, digits and dashes")
    return uid


def _text(body: Row, name: str, max_characters: int, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or len(value) > max_characters:
        raise HTTPException(400, f"{name} must be a text of at most {max_characters:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise HTTPException(400, f"{name} holds half a character") from None
    return value


def _integer(body: Row, name: str, minimum: int, maximum: int) -> int:
    value = body.get(name)
    if type(value) is not int or not minimum <= value <= maximum:
        raise HTTPException(400, f"{name} must be a whole number from {minimum} to {maximum:,}")
    return value


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _failed(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)
