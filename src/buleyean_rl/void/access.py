"""Access control around the whole application: token, host, origin, content type, content policy.

On a loopback address the danger is other pages in the same browser (CSRF, DNS rebinding): the host must be one of
ours, a POST needs a content type that browsers do not send across origins unasked, and its origin must be the page's.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any

TYPES = ("application/json", "application/octet-stream")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors "
)


class AccessControl:
    """ASGI middleware that refuses what may not pass.

    Args:
        app: the application.
        token: of visible ASCII, must be shown to `/api`; None for none.
        hosts: names under which the page may be asked for, without ports; None for any.
        on_shutdown: called at the end.
    """

    def __init__(
        self, app: Any, *, token: str | None, hosts: frozenset[str] | None, on_shutdown: Callable[[], None]
    ) -> None:
        self._app, self._token, self._hosts, self._on_shutdown = app, token, hosts, on_shutdown
        ancestors = "'none'" if token is None else "'self' https://huggingface.co"  # a Space lives in a frame there
        self._headers = [
            (b"content-security-policy", (POLICY + ancestors).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        problem = self._problem(scope)
        if problem is None:
            await self._app(scope, receive, send_guarded)
            return
        status, text = problem
        body = json.dumps({"error": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send_guarded({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _problem(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "this page goes by another name"
        if scope["path"].startswith("/api/"):
            presented = headers.get("authorization", "")
            if self._token is not None and not _is_bearer(presented, self._token):
                problem = "is not the one the server printed" if presented else "is needed: the server printed it"
                return 401, f"the token {problem}"
            if scope["method"] == "POST":
                origin = headers.get("origin")
                if origin is not None and origin.partition("://")[2] != host:
                    return 403, "another page may not do that"
                if headers.get("content-type", "").partition(";")[0] not in TYPES:
                    return 415, "say what the body is: application/json"
        return None

    async def _lifespan(self, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._on_shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _is_bearer(presented: str, token: str) -> bool:
    return hmac.compare_digest(presented.encode("latin-1"), f"Bearer {token}".encode("ascii"))


def _name(host: str) -> str:
    """A host name without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
