"""Requests to the interface of another program: retried, bounded, and with its key in no message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.endpoint_client import EndpointClient, Reply, TransientError, parse_address
from buleyean_rl.inference.endpoint_reply import error_message, is_retried, retry_after

PAGE_BYTES = 256 << 20
PAGE_SECONDS, DOWNLOAD_SECONDS = 120.0, 3600.0
TRIES, FIRST_PAUSE, MAX_PAUSE = 5, 1.0, 60.0
NO_SUCH = (404, 405)
ERROR_BYTES = 64 << 10
Query = Mapping[str, str | int] | Sequence[tuple[str, str | int]]


class Missing(Exception):
    """There is nothing at a path: deleted, or another version of the program."""


class Page(Missing):
    """There is a page for browsers: so Open WebUI answers for a path that it does not have, and a proxy for a login."""


class Api:
    """The interface of a program.

    Args:
        url: of the program.
        key: that opens it.
        headers: by which the key is shown; None for a bearer token.
        variable: of the environment, which the key is read from.

    Raises:
        UsageError: the URL is none, or there is no key.
    """

    def __init__(self, url: str, key: str, variable: str, headers: Mapping[str, str] | None = None) -> None:
        parse_address(url)
        self.url = url.rstrip("/")
        if not key:
            raise UsageError(f"{self.url} needs a key: set {variable}, or name a file that holds it with --api-key")
        self._variable = variable
        self._client = EndpointClient(self.url, key, 4, headers=headers)

    async def get(self, path: str, query: Query = ()) -> Any:
        """The JSON at a path.

        Raises:
            Missing: there is nothing.
            UsageError: the key is not accepted.
            EngineError: it does not answer, or not with JSON.
        """
        return self._decode(await self._send("GET", f"{path}?{urlencode(query)}" if query else path, None), path)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a request is answered with. See `get`."""
        return self._decode(await self._send("POST", path, body), path)

    async def download(self, path: str, target: Path) -> None:
        """Write what is at a path to a file. See `get`."""

        async def write() -> Reply:
            async with asyncio.timeout(DOWNLOAD_SECONDS), self._client.stream("GET", path, None) as reply:
                body = b""
                if reply.status == 200:
                    _check_is_data(reply.headers, path)
                    with target.open("wb") as file:
                        async for piece in reply.pieces:
                            file.write(piece)
                else:
                    async for piece in reply.pieces:
                        body += piece
                        if len(body) > ERROR_BYTES:
                            break
                return Reply(reply.status, reply.headers, body)

        await self._retry(path, write)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def fail(self, path: str, what: str) -> EngineError:
        """The error that a reply is not as it should be: another version of the program answers otherwise."""
        return EngineError(f"{self.url}/{path}: {what}: its version may be newer than this program knows")

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Reply:
        return await self._retry(path, lambda: self._client.send(method, path, body, PAGE_BYTES, PAGE_SECONDS))

    async def _retry(self, path: str, request: Callable[[], Awaitable[Reply]]) -> Reply:
        """The reply to a request, sent again where that may help."""
        pause = FIRST_PAUSE
        for last in (*(False,) * (TRIES - 1), True):
            try:
                reply = await request()
                if reply.status == 200:
                    _check_is_data(reply.headers, path)
                    return reply
                pause = self._pause(reply, path, pause, last)
            except (TransientError, TimeoutError) as problem:
                if last:
                    raise EngineError(f"{self.url}/{path}: {str(problem) or 'timed out'}") from None
            await asyncio.sleep(pause)
            pause = min(MAX_PAUSE, 2 * pause)
        raise AssertionError("the last try returns or raises")

    def _pause(self, reply: Reply, path: str, pause: float, last: bool) -> float:
        """How long to wait before the next try; raises where there is none."""
        shown = self._client.show(error_message(reply.body))
        if reply.status in (401, 403):
            raise UsageError(f"{self.url}: the key in {self._variable} is not accepted for {path}: {shown}")
        if reply.status in NO_SUCH:
            raise Missing(path)
        if (place := reply.headers.get("location")) and 300 <= reply.status < 400:
            raise EngineError(f"{self.url}/{path} is at {self._client.show(place)} now: name that address")
        if last or not is_retried(reply.status):
            raise EngineError(f"{self.url}/{path}: status {reply.status}: {shown}")
        return min(MAX_PAUSE, max(pause, retry_after(reply.headers) or 0.0))

    def _decode(self, reply: Reply, path: str) -> Any:
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError):
            raise self.fail(path, "its reply is no JSON") from None


def _check_is_data(headers: Mapping[str, str], path: str) -> None:
    if headers.get("content-type", "").startswith("text/html"):
        raise Page(path)
