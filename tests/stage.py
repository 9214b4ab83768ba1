"""A server that shows the page in any state: what the real one would say, written down."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import buleyean_rl.void
from buleyean_rl.void.app import guard
from buleyean_rl.void.markdown import render
from voids import free_port, until

PAGE = Path(buleyean_rl.void.__file__).parent / "page"
NAMES = {"base": "smollm2-135m", "run-1": "sleep tips"}
NOON = time.time()
Row = dict[str, Any]


def answer(identity: int, slot: int, text: str, state: str = "done", *, rejected: Any = (), **more: Any) -> Row:
    """An answer; `rejected` holds [] for all of it, or spans, each with a reason."""
    rejections = [{"id": identity * 10 + at, "spans": spans, "reason": why} for at, (spans, why) in enumerate(rejected)]
    model = "run-1" if slot else "base"
    html = render(text, tuple((start, end) for row in rejections for start, end in row["spans"]))
    made: Row = {"id": identity, "turn": "turn-0001", "slot": slot, "attempt": 0, "state": state, "text": text}
    return made | {"html": html, "error": "", "rejections": rejections, "model": model, "name": NAMES[model]} | more


def turn(prompt: str, *answers: Row, uid: str = "turn-0001", **more: Any) -> Row:
    settings = {"system": "", "temperature": 0, "max_tokens": 512}
    made: Row = {"id": uid, "conversation": "talk-0001", "prompt": prompt, "blind": False, "revealed": True}
    return made | {"settings": settings, "created": NOON, "answers": list(answers)} | more


def conversation(*turns: Row) -> Row:
    settings = {"system": "", "temperature": 0, "max_tokens": 512, "blind": False}
    return {"id": "talk-0001", "title": turns[0]["prompt"], "created": NOON, "settings": settings, "turns": list(turns)}


class Scene:
    """What the server says: by path of a GET, and by path of a POST.

    Args:
        state: what differs from a server where nothing happened yet.
        replies: of other paths, without their query; an integer is a status to refuse with.
    """

    def __init__(self, state: Row | None = None, token: str | None = None, **replies: Any) -> None:
        plan: Row = {"rejections": 0, "records": 0, "steps": 12, "seconds": None, "problem": "no_rejections"}
        self.state: Row = {
            "loading": None,
            "pair": [{"model": "base", "name": NAMES["base"]}],
            "rejections": 0,
            "conversations": 0,
            "models": 0,
            "batches": 0,
            "newest": [],
            "plan": plan,
            "run": None,
            "verdict": None,
            "changes": 0,
        } | (state or {})
        self.token = token
        self.away = False
        self.replies: Row = {
            "conversations": {"conversations": [], "more": False},
            "imports": {"imports": []},
        } | replies


@contextmanager
def staged() -> Iterator[Stage]:
    """The server, in a thread of its own."""
    stage = Stage()
    config = uvicorn.Config(
        stage.app, port=stage.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, 30)
    try:
        yield stage
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


class Stage:
    """Shows one scene after the other."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.scene = Scene()
        api = [
            Route("/events", self._events),
            Route("/turns/{uid}/stream", self._stream),
            Route("/{path:path}", self._reply, methods=["GET", "POST"]),
        ]
        app = Starlette(routes=[Mount("/api", routes=api), Mount("/", StaticFiles(directory=PAGE, html=True))])
        self.app = guard(app, token=None, hosts=None, on_shutdown=lambda: None)

    def show(self, scene: Scene) -> None:
        self.scene = scene

    def tell(self, **state: Any) -> None:
        """Something changes while the page is open."""
        self.scene.state |= state | {"changes": self.scene.state["changes"] + 1}

    def _refusal(self, request: Request) -> Response | None:
        if self.scene.away:
            return JSONResponse({"error": "away"}, status_code=503)
        if self.scene.token and request.headers.get("authorization") != f"Bearer {self.scene.token}":
            return JSONResponse({"error": "the token is needed"}, status_code=401)
        return None

    async def _events(self, request: Request) -> Response:
        scene = self.scene

        async def states() -> AsyncIterator[str]:
            sent = ""
            while self.scene is scene and not scene.away and not await request.is_disconnected():
                if (now := json.dumps(scene.state)) != sent:
                    sent = now
                    yield f"data: {now}\n\n"
                await asyncio.sleep(0.05)

        return self._refusal(request) or StreamingResponse(states(), media_type="text/event-stream")

    async def _stream(self, request: Request) -> Response:
        scene = self.scene

        async def nothing_more() -> AsyncIterator[str]:
            while self.scene is scene and not await request.is_disconnected():
                yield ":\n\n"
                await asyncio.sleep(0.05)

        return self._refusal(request) or StreamingResponse(nothing_more(), media_type="text/event-stream")

    async def _reply(self, request: Request) -> Response:
        path = request.path_params["path"]
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if path == "state":
            return JSONResponse(self.scene.state)
        reply = self.scene.replies.get(f"{request.method} {path}", self.scene.replies.get(path, 404))
        if isinstance(reply, tuple):
            status, problem = reply
            return JSONResponse(problem, status_code=status)
        if isinstance(reply, int):
            return JSONResponse({"error": f"there is no {path}"}, status_code=reply)
        return JSONResponse(reply)
