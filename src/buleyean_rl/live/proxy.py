"""A request on its way to the engine, and the reply on its way back, as it comes.

    client --JSON--> Relay --its model's fields--> engine
    client <--------- Relay <--pieces, events------ engine      the model's name as the client knows it

The client hangs up: the engine stops. The engine breaks off: the client is told, within its stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from buleyean_rl.inference.endpoint_client import StreamedReply, TransientError
from buleyean_rl.live.serving import Choice

RUN_HEADER = "X-Buleyean-Run"
STREAM_TYPE = "text/event-stream"
Event = dict[str, Any]
OnEvent = Callable[[Event], Event]
AtEnd = Callable[[], Awaitable[None]]


def refusal(status: int, problem: str) -> Event:
    """The body of an error, as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": problem, "type": kind, "code": status}}


def refuse(status: int, problem: str, headers: Mapping[str, str] | None = None) -> Response:
    """A reply that says what is wrong."""
    return JSONResponse(refusal(status, problem), status_code=status, headers=dict(headers or {}))


def _pass_on(event: Event) -> Event:
    return event


class Relay:
    """The reply to a completion, an application of ASGI.

    Args:
        choice: who answers.
        path: within the engine.
        body: of the request to the engine.
        on_event: sees each part of the reply as the engine sent it, and returns what the client gets.
        at_end: called once the reply has ended, or the client has hung up.
    """

    def __init__(
        self, choice: Choice, path: str, body: Event, on_event: OnEvent = _pass_on, at_end: AtEnd | None = None
    ) -> None:
        self._choice, self._path, self._body, self._on_event, self._at_end = choice, path, body, on_event, at_end
        self._headers = {RUN_HEADER: quote(choice.run, safe=" +()[]:,")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay until the reply has ended or the client hangs up."""
        with self._choice.engine.lease():
            relaying = asyncio.ensure_future(self._relay(scope, receive, send))
            hanging_up = asyncio.ensure_future(_hang_up(receive))
            try:
                await asyncio.wait({relaying, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (relaying, hanging_up):
                    task.cancel()
                await asyncio.gather(relaying, hanging_up, return_exceptions=True)
        if self._at_end is not None:
            await self._at_end()
        if not relaying.cancelled() and (error := relaying.exception()) is not None:
            raise error

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False
        try:
            async with self._choice.engine.client.stream("POST", self._path, self._body) as reply:
                if reply.headers.get("content-type", "").startswith(STREAM_TYPE):
                    is_begun = True
                    await self._relay_events(reply, send)
                else:
                    raw = b"".join([piece async for piece in reply.pieces])
                    await self._whole(reply.status, raw)(scope, receive, send)
        except TransientError as problem:
            text = f"the model broke off: {problem}"
            if is_begun:
                await send(_part(_encode(refusal(502, text)), more=False))
            else:
                await refuse(503, text, {"Retry-After": "5"})(scope, receive, send)

    async def _relay_events(self, reply: StreamedReply, send: Send) -> None:
        names = {"content-type": STREAM_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"} | self._headers
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in names.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for event in _split_events(reply.pieces):
            await send(_part(self._rename(event), more=True))
        await send(_part(b"", more=False))

    def _whole(self, status: int, raw: bytes) -> Response:
        try:
            event = json.loads(raw)
        except ValueError:
            return refuse(502, "the model's reply is no JSON", self._headers)
        return JSONResponse(self._shown(event), status_code=status, headers=self._headers)

    def _rename(self, event: bytes) -> bytes:
        """An event of the engine's stream as the client gets it."""
        name, _, value = event.partition(b": ")
        if name != b"data" or value == b"[DONE]":
            return event + b"\n\n"
        return _encode(self._shown(json.loads(value)))

    def _shown(self, event: Event) -> Event:
        event = self._on_event(event)
        return event | {"model": self._choice.model} if "model" in event else event


async def _split_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events of a stream, without the empty line after each."""
    waiting = b""
    async for piece in pieces:
        *events, waiting = (waiting + piece).split(b"\n\n")
        for event in events:
            yield event


async def _hang_up(receive: Receive) -> None:
    """Wait until the client does; its request was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _encode(event: Event) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode(errors="replace") + b"\n\n"


def _part(body: bytes, *, more: bool) -> Event:
    return {"type": "http.response.body", "body": body, "more_body": more}
