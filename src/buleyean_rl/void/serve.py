"""Start the page: take the address and the folder, listen, and load the models meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import uvicorn
from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.open import is_endpoint
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.source import resolve
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.void.app import make_app
from buleyean_rl.void.listener import PromptProtocol, listen, urls
from buleyean_rl.void.loading import load, shown_name
from buleyean_rl.void.services import Loading
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import LoadingClock

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
TOKEN_VARIABLE = "BULEYEAN_VOID_TOKEN"
STORE = "void.db"
GRACE_SECONDS = 3  # for requests under way when the server ends


def serve(model: str, folder: Path, host: str, port: int, *, console: Console) -> None:
    """Run the page until it is interrupted.

    Args:
        model: the base model, as for `train`.
        folder: holds the store and the runs.
        host: the address to listen on; one that others can reach needs a token.
        port: 0 for a free one.
        console: where the address is said.

    Raises:
        UsageError: the model cannot be trained, or the address cannot be had.
        ModelError: the model cannot be loaded.
    """
    listener = listen(host, port)
    try:
        server = Server(model, folder, host, listener.getsockname()[1], console)
        addresses = "\n               ".join(escape(url) for url in server.urls)
        console.print(f"The Void is at [bold]{addresses}[/]", soft_wrap=True)
        console.print(f"Ctrl-C ends it; what was rejected is in {escape(str(folder))}", soft_wrap=True)
        server.run(listener)
    finally:
        listener.close()


class Server:
    """A server that has its folder, and loads its models once it runs.

    Args:
        model: the base model.
        folder: holds the store and the runs.
        host: the address it will listen on.
        port: the port there.
        console: where the base model says what it computes with, and runs that cannot be used; None for nowhere.

    Attributes:
        loading: the parts of the server.
        urls: where the page is, with its token if it has one.

    Raises:
        UsageError: the model cannot be trained, or another server has the folder.
        ModelError: there is no such model.
    """

    def __init__(self, model: str, folder: Path, host: str, port: int, console: Console | None = None) -> None:
        if is_endpoint(model) or is_run(model):
            raise UsageError(f"{model} cannot be trained here: name a base model, as for `buleyean train`")
        token = _choose_token(host)
        self._model, self._console = model, console
        self._problem: Exception | None = None
        self.loading = Loading(shown_name(model))
        with ExitStack() as opened:
            # two would train the same run twice
            opened.enter_context(claim_folder(folder, lambda path: (path / STORE).exists(), "store of rejections"))
            self._source = resolve(model)
            self._store = Store(folder / STORE)
            opened.callback(self._store.close)
            self._opened = opened.pop_all()
        self._loader = threading.Thread(target=self._load, name="load", daemon=True)
        hosts = LOOPBACK if token is None else None
        app = make_app(self.loading, token=token, hosts=hosts, on_shutdown=self._close)
        settings = uvicorn.Config(
            *(app,), http=PromptProtocol, ws="none", log_level="error", server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
        self._uvicorn = _Uvicorn(settings, self._begin_to_end)
        fragment = "" if token is None else f"#token={quote(token, safe='')}"
        self.urls = [url + fragment for url in urls(host, port)]

    def run(self, listener: socket.socket) -> None:
        """Serve until it is interrupted, or the models cannot be loaded.

        Raises:
            BuleyeanError: they cannot.
        """
        self._loader.start()
        self._uvicorn.run(sockets=[listener])
        if self._problem is not None:
            raise self._problem

    def _load(self) -> None:
        clock = self.loading.clock = LoadingClock(self._store.settings, self._source.absolute_name)
        try:
            self.loading.void = load(self._model, self._source, self._store, self._opened, self._console)
            with suppress(OSError):  # the disk is full: then the next start is not foretold
                clock.learn()
        except Exception as error:
            self._problem = error
            self._uvicorn.should_exit = True

    def _begin_to_end(self) -> None:
        """Let go of those who wait: streams, and a file that is being read."""
        self.loading.closing = True
        if self.loading.void is not None:
            self.loading.void.importer.close()

    def _close(self) -> None:
        self._loader.join()
        self._opened.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which would cancel requests under way and print where they were.

    Args:
        config: see uvicorn.
        on_end: called before it waits for requests under way.
    """

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_end = on_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, once nobody waits."""
        await asyncio.to_thread(self._on_end)
        await super().shutdown(sockets)


def _choose_token(host: str) -> str | None:
    """The token of an address; None for one that only this machine reaches."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return None
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    if not re.fullmatch(r"[!-~]+", token):  # browsers send no other in a header
        raise UsageError(f"{TOKEN_VARIABLE} must be ASCII letters, digits and signs, without spaces: choose another")
    return token
