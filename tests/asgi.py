"""Requests to an ASGI application in this process, as raw as a client could send them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def send(
    app: Any,
    method: str,
    path: str,
    *,
    query: bytes = b"",
    headers: Iterable[tuple[bytes, bytes]] = (),
    body: bytes = b"",
    seconds: float = 60.0,
) -> Reply:
    """One request; a stream is listened to until a client would hang up, after `seconds`."""
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode("utf-8", "surrogatepass"), "query_string": query}
    scope |= {"headers": list(headers), "root_path": "", "server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1)}
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    started: dict[str, Any] = {}
    parts: list[bytes] = []
    hung_up = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def hear(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            parts.append(message.get("body", b""))

    asyncio.get_running_loop().call_later(seconds, hung_up.set)
    await app(scope, receive, hear)
    replied = {name.decode("latin-1"): value.decode("latin-1") for name, value in started["headers"]}
    return Reply(started["status"], replied, b"".join(parts))


JSON = [(b"host", b"127.0.0.1:7860"), (b"content-type", b"application/json")]
BINARY = [(b"host", b"127.0.0.1:7860"), (b"content-type", b"application/octet-stream")]


def call(app: Any, method: str, path: str, value: Any = None, **options: Any) -> Reply:
    """One request of the page's, with a JSON body."""
    body = b"" if value is None else json.dumps(value).encode()
    return asyncio.run(send(app, method, path, **{"headers": JSON, "body": body} | options))
