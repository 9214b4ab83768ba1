"""The relay of one request: a client that hangs up, an engine that breaks off, names that are not the engine's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from asgi import Reply, send
from buleyean_rl.inference.endpoint_client import StreamedReply, TransientError
from buleyean_rl.live.proxy import Relay
from buleyean_rl.live.serving import Choice

STREAM = {"content-type": "text/event-stream"}


class StandIn:
    """An engine whose reply consists of given pieces, and then goes on for ever or breaks off."""

    def __init__(self, pieces: list[bytes], end: str = "", status: int = 200, headers: Any = STREAM) -> None:
        self.pieces, self.end, self.status, self.headers = pieces, end, status, headers
        self.client, self.leases, self.is_closed = self, 0, False

    @contextmanager
    def lease(self) -> Iterator[None]:
        self.leases += 1
        yield
        self.leases -= 1

    @asynccontextmanager
    async def stream(self, *_: Any) -> AsyncIterator[StreamedReply]:
        if not self.pieces:
            raise TransientError("refused")
        try:
            yield StreamedReply(self.status, self.headers, self._pieces())
        finally:
            self.is_closed = True

    async def _pieces(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.end == "breaks off":
            raise TransientError("the connection failed")
        if self.end == "goes on":
            await asyncio.Event().wait()


def ask(engine: StandIn, seconds: float = 60.0, **options: Any) -> Reply:
    relay = Relay(Choice(engine, {}, "tiny", "my run/ä"), "v1/completions", {}, **options)  # type: ignore[arg-type]
    reply = asyncio.run(send(relay, "POST", "/v1/completions", seconds=seconds))
    assert engine.leases == 0
    return reply


def test_events_go_through_whole_with_the_clients_name_of_the_model() -> None:
    whole = b'data: {"model": "/a/path", "text": "\xc3\xa4\\n\\n"}\n\ndata: [DONE]\n\n'
    for cut in (1, 7, 40, len(whole)):
        reply = ask(StandIn([whole[:cut], whole[cut:]]))
        events = reply.body.split(b"\n\n")
        assert json.loads(events[0].removeprefix(b"data: ")) == {"model": "tiny", "text": "ä\n\n"}
        assert events[1:] == [b"data: [DONE]", b""]
        assert reply.headers["x-buleyean-run"] == "my run%2F%C3%A4"


def test_a_client_that_hangs_up_stops_its_engine() -> None:
    engine, ends = StandIn([b'data: {"model": "m"}\n\n'], "goes on"), list[bool]()

    async def note_end() -> None:
        ends.append(engine.is_closed)

    assert ask(engine, seconds=0.05, at_end=note_end).status == 200
    assert ends == [True]


def test_an_engine_that_breaks_off_is_told_of() -> None:
    reply = ask(StandIn([b'data: {"model": "m"}\n\ndata: {"mod'], "breaks off"))
    last = json.loads(reply.body.split(b"\n\n")[-2].removeprefix(b"data: "))
    assert "broke off" in last["error"]["message"]
    assert ask(StandIn([])).status == 503
    assert ask(StandIn([b"half"], "breaks off", headers={})).status == 503
    assert ask(StandIn([b"<html>"], headers={})).status == 502


def test_an_error_of_the_engine_goes_through() -> None:
    reply = ask(StandIn([b'{"error": {"message": ', b'"too long"}}'], status=400, headers={}))
    assert (reply.status, reply.json()) == (400, {"error": {"message": "too long"}})
