"""The server and its address: taken, printed as people can open it, and closed to those who send half a request."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from buleyean_rl.errors import UsageError

REQUEST_SECONDS = 10  # for the head of a request; see `body.read_body` for its body
ANY_ADDRESS = ("0.0.0.0", "::")


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before minutes of loading.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Unless its protocol is named, asyncio leaves Nagle's algorithm on, and every answer waits 40 ms for it.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter for a name that can be none
        problem = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {problem}: choose another --port or --host") from error
    return listener


def urls(host: str, port: int) -> list[str]:
    """Where a browser finds the server: for the address of all interfaces, this machine's own addresses.

    Args:
        host: the address listened on.
        port: the port there.
    """
    hosts = [host]
    if host in ANY_ADDRESS:
        families = {socket.AF_INET} if host == "0.0.0.0" else {socket.AF_INET, socket.AF_INET6}
        addresses = {
            address.address
            for interface in psutil.net_if_addrs().values()
            for address in interface
            if address.family in families and not address.address.startswith("fe80")  # those need an interface's name
        }
        hosts = sorted(addresses, key=_nearest_first) or ["127.0.0.1"]
    return [f"http://{f'[{name}]' if ':' in name else name}:{port}/" for name in hosts]


def _nearest_first(address: str) -> tuple[bool, bool, str]:
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback, parsed.version == 6, address


class PromptProtocol(H11Protocol):
    """uvicorn's protocol, which would wait for the rest of a request's head for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting, unless a request's head has come."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn, which would cancel requests under way and print where they were.

    Args:
        app: the application.
        grace_seconds: for requests under way when it ends.
        on_end: called before it waits for them.
    """

    def __init__(self, app: Any, grace_seconds: int, on_end: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PromptProtocol,
                ws="none",
                log_level="error",
                server_header=False,
                timeout_graceful_shutdown=grace_seconds,
            )
        )
        self._on_end = on_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, once nobody waits."""
        await asyncio.to_thread(self._on_end)
        await super().shutdown(sockets)
