"""Access control around a whole application: token, host, origin, content type.

On a loopback address the danger is other pages in the same browser (CSRF, DNS rebinding): the host must be one of
ours, a POST needs a content type that browsers do not send across origins unasked, and its origin must be the server's.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from buleyean_rl.errors import UsageError

TYPES = ("application/json", "application/octet-stream")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})  # as they stand in a request's head
LOOPBACK_HOSTS = frozenset(name.strip("[]") for name in LOOPBACK)
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
Header = tuple[bytes, bytes]


def choose_token(host: str, variable: str, chosen: str = "") -> str | None:
    """The token of an address; None for one that only this machine reaches.

    Args:
        host: the address.
        variable: of the environment, that may hold a token.
        chosen: by the user in another way; "" for not.

    Raises:
        UsageError: it cannot be sent in a request.
    """
    if host in LOOPBACK_HOSTS and not chosen:
        return None
    token = chosen or os.environ.get(variable) or secrets.token_urlsafe(16)
    if not re.fullmatch(r"[!-~]+", token):  # clients send no other in a header
        raise UsageError(f"{variable} must be ASCII letters, digits and signs, without spaces: choose another")
    return token


def explain(status: int, problem: str) -> Any:  # noqa: ARG001 - others say the status too
    """The body of a refusal.

    Args:
        status: of HTTP.
        problem: for people.
    """
    return {"error": problem}


class AccessControl:
    """ASGI middleware that refuses what may not pass.

    Args:
        app: the application.
        token: of visible ASCII, must be shown; None for none.
        hosts: names under which the server may be asked for, without ports; None for any.
        guards: whether a path is guarded by token, origin and content type.
        headers: added to every reply.
        explain: the body of a refusal, of its status and its problem.
        on_shutdown: called at the end.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str | None,
        hosts: frozenset[str] | None,
        guards: Callable[[str], bool],
        on_shutdown: Callable[[], None],
        headers: Sequence[Header] = (),
        explain: Callable[[int, str], Any] = explain,
    ) -> None:
        self._app, self._token, self._hosts, self._on_shutdown = app, token, hosts, on_shutdown
        self._guards, self._headers, self._explain = guards, [*headers, *HEADERS], explain

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
        body = json.dumps(self._explain(status, text)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send_guarded({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _problem(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "this server goes by another name"
        if self._guards(scope["path"]):
            presented = headers.get("authorization", "")
            if self._token is not None and not _is_bearer(presented, self._token):
                problem = "is not the one the server printed" if presented else "is needed: the server printed it"
                return 401, f"the token {problem}"
            if scope["method"] == "POST":
                origin = headers.get("origin")
                if origin is not None and origin.partition("://")[2] != host:
                    return 403, "another page may not do that"
                if headers.get("content-type", "").partition(";")[0].strip().lower() not in TYPES:
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
