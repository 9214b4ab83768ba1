"""Start the page: load the models, open the store, go on with what was under way, listen."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.open import is_endpoint, open_engine
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.models.run_folder import is_run
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.locks import FileLock
from buleyean_rl.void.answering import MAX_TOKENS, Answering, ServedModel
from buleyean_rl.void.app import Void, make_app
from buleyean_rl.void.store import Store
from buleyean_rl.void.training import Training

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
TOKEN_VARIABLE = "BULEYEAN_VOID_TOKEN"
SAMPLES = 4  # prompts whose answers a run is shown with
ENGINE = "transformers"  # the trained model is an adapter on the base


@dataclass(frozen=True)
class Server:
    """A server that is ready to run.

    Args:
        uvicorn: runs the application until it is told to exit.
        void: what the page works on.
        url: where the page is, with its token if it has one.
    """

    uvicorn: uvicorn.Server
    void: Void
    url: str


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
    listener = _listen(host, port)
    try:
        with console.status(f"loading {escape(model)}"):
            server = prepare(model, folder, host, listener.getsockname()[1], console)
        where = f"what was rejected is in {escape(str(folder))}"
        console.print(f"The Void is at [bold]{server.url}[/] (Ctrl-C ends it; {where})", soft_wrap=True)
        server.uvicorn.run(sockets=[listener])
    finally:
        listener.close()


def prepare(model: str, folder: Path, host: str, port: int, console: Console | None = None) -> Server:
    """A server with its models loaded, and with the run that an earlier one left unfinished under way.

    Args:
        model: the base model.
        folder: holds the store and the runs.
        host: the address it will listen on.
        port: the port there.
        console: where the base model says what it computes with; None for nowhere.
    """
    if is_endpoint(model) or is_run(model):
        raise UsageError(f"{model} cannot be trained here: name a base model, as for `buleyean train`")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        opened.enter_context(FileLock(folder / "void.lock"))  # two would train the same run twice
        name = Path(model).name if Path(model).exists() else model  # the page shows no path of this machine
        source = resolve(model)
        base = ServedModel(name, open_engine(source, ENGINE, console))
        store = Store(folder / "void.db")
        opened.callback(store.close)
        answering = Answering(store, base)
        opened.callback(answering.close)

        def swap_in(run: int, run_folder: Path) -> None:
            trained = _trained(run, source.with_adapter(run_folder))
            prompts = list(dict.fromkeys(row["prompt"] for row in store.rejections()["rows"]))[:SAMPLES]
            before, after = _answers(base.engine, prompts), _answers(trained.engine, prompts)
            store.add_samples(run, list(zip(prompts, before, after, strict=True)))
            answering.models["trained"] = trained

        training = Training(store, folder / "runs", model, swap_in)
        opened.callback(training.close)
        last = next((run for run in store.runs() if run["state"] == "done" and is_run(run["folder"])), None)
        if last is not None:
            answering.models["trained"] = _trained(last["id"], source.with_adapter(Path(last["folder"])))
        training.resume()
        shut_down = opened.pop_all().close

    void = Void(store, answering, training)
    is_local = host in ("127.0.0.1", "localhost", "::1")
    token = None if is_local else os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    app = make_app(void, token=token, hosts=LOOPBACK if is_local else None, on_shutdown=shut_down)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws="none", server_header=False)
    address = f"[{host}]" if ":" in host else host
    return Server(uvicorn.Server(config), void, f"http://{address}:{port}/" + (f"#token={token}" if token else ""))


def _trained(run: int, source: Source) -> ServedModel:
    return ServedModel(f"run {run}", open_engine(source, ENGINE))


def _answers(engine: Engine, prompts: list[str]) -> list[str]:
    """Generated as the page generates them, so that they equal what was rejected: batches differ in the last digits."""
    sampling = Sampling(max_tokens=MAX_TOKENS)
    return ["".join(engine.generate([{"role": "user", "content": prompt}], sampling)) for prompt in prompts]


def _listen(host: str, port: int) -> socket.socket:
    """The address, taken before minutes of loading."""
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
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}: choose another --port") from error
    return listener
