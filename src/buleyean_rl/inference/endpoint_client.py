"""HTTP to an endpoint: a request, and a reply that is bounded in bytes and in seconds."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urldefrag, urlsplit

import httpx2

from buleyean_rl.errors import UsageError

MAX_REPLY_BYTES = 8 << 20
ENVELOPE_BYTES = 64 << 10  # of a reply beside its answer
BYTES_PER_TOKEN = 16
CONNECT_SECONDS = 10.0
SHOWN_CHARACTERS = 200  # of what an endpoint says
SECRET_CHARACTERS = 16  # a shorter key, such as `ollama` or EMPTY, is a word that an answer may have, and no secret


@dataclass(frozen=True)
class Address:
    """Where an endpoint is.

    Args:
        url: without a trailing slash.
        model: its name there; "" for the first that the endpoint lists.
    """

    url: str
    model: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: what a key is for."""
        parts = urlsplit(self.url)
        return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def parse_address(url: str) -> Address:
    """The address in a URL such as `http://localhost:8000/v1#model`.

    Raises:
        UsageError: it is none, or has a password or a query in it, which would be written into journals.
    """
    url, model = urldefrag(url.strip())
    shown = re.sub(r"//.*@", "//", url.partition("?")[0])
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        is_valid = False
    if not is_valid:
        raise UsageError(f"{shown!r} is no endpoint: give one like http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query:
        raise UsageError(f"{shown}: leave out what stands before @ or after ?: a key belongs in the environment")
    if parts.path in ("", "/"):
        url = url.rstrip("/") + "/v1"
    return Address(url.rstrip("/"), model)


def is_same_host(url: str, other: str) -> bool:
    """Whether two models' names are endpoints of the same scheme, host and port."""
    both_are_urls = all(name.startswith(("http://", "https://")) for name in (url, other))
    return both_are_urls and parse_address(url).origin == parse_address(other).origin


def read_key(variable: str) -> str:
    """The key in an environment variable; "" if there is none.

    Raises:
        UsageError: it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{variable} has characters that no key has: set it again")
    return key


class TransientError(Exception):
    """A failure that may not occur in the next attempt.

    Args:
        problem: for people.
        is_rate_limit: the endpoint asks for fewer requests.
        retry_after: seconds that it asks to wait.
    """

    def __init__(self, problem: str, *, is_rate_limit: bool = False, retry_after: float | None = None) -> None:
        self.is_rate_limit, self.retry_after = is_rate_limit, retry_after
        super().__init__(problem)


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        status: of HTTP.
        headers: by their names in lower case.
        body: decompressed; of an error, its beginning.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class StreamedReply:
    """A reply that is still coming.

    Args:
        status: of HTTP.
        headers: by their names in lower case.
        pieces: of the body, decompressed, as they come.
    """

    status: int
    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]


class EndpointClient:
    """Sends requests to one endpoint. It follows no redirect and keeps no cookie.

    Args:
        url: of the endpoint.
        key: a bearer token, or "".
        parallel: concurrent requests.
        is_own: a process of ours on this machine, which no proxy of the environment stands before.
        headers: by which the key is shown, where not as a bearer token.
    """

    def __init__(
        self, url: str, key: str, parallel: int, *, is_own: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        shown = headers or ({"Authorization": f"Bearer {key}"} if key else {})
        self._secrets = [secret for secret in (key, *(value.split()[-1] for value in shown.values())) if secret]
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=dict(shown),
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            # llama.cpp closes connections without a word: a request on a kept one would be lost
            limits=httpx2.Limits(max_connections=parallel, max_keepalive_connections=0 if is_own else None),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            trust_env=not is_own,
        )

    async def send(
        self, method: str, path: str, request: Mapping[str, Any] | None, max_bytes: int, max_seconds: float
    ) -> Reply:
        """A request's reply.

        Args:
            method: of HTTP.
            path: within the endpoint.
            request: sent as JSON.
            max_bytes: of the reply, decompressed.
            max_seconds: from connecting to the reply's last byte.

        Raises:
            TransientError: no reply, a truncated or damaged one, or one beyond the limits.
        """
        try:
            async with asyncio.timeout(max_seconds), self.stream(method, path, request) as reply:
                body = bytearray()
                async for piece in reply.pieces:
                    body += piece
                    if len(body) > max_bytes:
                        break
                if len(body) > max_bytes and 200 <= reply.status < 300:
                    raise TransientError(f"its reply is longer than {max_bytes:,} bytes")
                del body[max_bytes:]
                return Reply(reply.status, reply.headers, bytes(body))
        except TimeoutError:
            raise TransientError(f"timed out after {max_seconds:g} seconds") from None

    @asynccontextmanager
    async def stream(self, method: str, path: str, request: Mapping[str, Any] | None) -> AsyncIterator[StreamedReply]:
        """A request's reply as it comes; leaving the context closes the connection.

        Args:
            method: of HTTP.
            path: within the endpoint.
            request: sent as JSON.

        Raises:
            TransientError: no reply, or one that breaks off, here or while its pieces are read.
        """
        try:
            async with self._client.stream(method, path, json=request) as reply:
                yield StreamedReply(reply.status_code, reply.headers, reply.aiter_bytes())
        except httpx2.RequestError as error:
            timed_out = isinstance(error, httpx2.TimeoutException)
            problem = self.show(str(error)) or type(error).__name__
            raise TransientError(f"{'timed out' if timed_out else 'the connection failed'} ({problem})") from None

    def show(self, text: str) -> str:
        """What an endpoint says, as one line for people: short, printable, without the key."""
        text = " ".join(self.redact(text).split())
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:SHOWN_CHARACTERS])

    def redact(self, text: str) -> str:
        """A text without the key, which an endpoint may echo."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    def redact_answer(self, text: str) -> str:
        """An answer without the key; a short one stays: the words of an answer are data."""
        return self.redact(text) if all(len(secret) >= SECRET_CHARACTERS for secret in self._secrets) else text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def max_reply_bytes(tokens: int) -> int:
    """The bytes that a reply of so many tokens may have."""
    return min(MAX_REPLY_BYTES, ENVELOPE_BYTES + BYTES_PER_TOKEN * tokens)
