"""Start the page: take the address and the folder, listen, and load the models meanwhile."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.open import is_endpoint
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.source import resolve
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.void.app import make_app
from buleyean_rl.void.loading import load, shown_name
from buleyean_rl.void.services import Loading
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import LoadingClock
from buleyean_rl.web import listener
from buleyean_rl.web.access import LOOPBACK, choose_token

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
    address = listener.listen(host, port)
    try:
        server = Server(model, folder, host, address.getsockname()[1], console)
        addresses = "\n               ".join(escape(url) for url in server.urls)
        console.print(f"The Void is at [bold]{addresses}[/]", soft_wrap=True)
        console.print(f"Ctrl-C ends it; what was rejected is in {escape(str(folder))}", soft_wrap=True)
        server.run(address)
    finally:
        address.close()


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
        token = choose_token(host, TOKEN_VARIABLE)
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
        self._uvicorn = listener.Server(app, GRACE_SECONDS, self._begin_to_end)
        fragment = "" if token is None else f"#token={quote(token, safe='')}"
        self.urls = [url + fragment for url in listener.urls(host, port)]

    def run(self, address: socket.socket) -> None:
        """Serve until it is interrupted, or the models cannot be loaded.

        Raises:
            BuleyeanError: they cannot.
        """
        self._loader.start()
        self._uvicorn.run(sockets=[address])
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
