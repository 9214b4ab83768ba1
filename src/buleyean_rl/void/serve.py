"""Start the page: load the models, open the store, go on with what was under way, listen."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import uvicorn
from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import BuleyeanError, ModelError, UsageError
from buleyean_rl.inference.open import engine_of, is_endpoint
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.run_files import is_run, read_run
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.void.answering import MAX_TOKENS, Answering, ServedModel
from buleyean_rl.void.app import make_app
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.listener import PromptProtocol, listen, urls
from buleyean_rl.void.routes.questions import MAX_PROMPT
from buleyean_rl.void.services import Void
from buleyean_rl.void.store import Store
from buleyean_rl.void.training import Training

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
TOKEN_VARIABLE = "BULEYEAN_VOID_TOKEN"
STORE = "void.db"
SAMPLES = 4  # prompts whose answers a run is shown with


@dataclass(frozen=True)
class Server:
    """A server that is ready to run.

    Args:
        uvicorn: runs the application until it is told to exit.
        void: what the page works on.
        urls: where the page is, with its token if it has one.
    """

    uvicorn: uvicorn.Server
    void: Void
    urls: list[str]


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
        with console.status(f"loading {escape(model)}"):
            server = prepare(model, folder, host, listener.getsockname()[1], console)
        addresses = "\n               ".join(escape(url) for url in server.urls)
        console.print(f"The Void is at [bold]{addresses}[/]", soft_wrap=True)
        console.print(f"Ctrl-C ends it; what was rejected is in {escape(str(folder))}", soft_wrap=True)
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
        console: where the base model says what it computes with, and runs that cannot be used; None for nowhere.
    """
    if is_endpoint(model) or is_run(model):
        raise UsageError(f"{model} cannot be trained here: name a base model, as for `buleyean train`")
    token = _choose_token(host)
    with ExitStack() as opened:
        # two would train the same run twice
        opened.enter_context(claim_folder(folder, lambda path: (path / STORE).exists(), "store of rejections"))
        name = Path(model).name if Path(model).exists() else model  # the page shows no path of this machine
        source = resolve(model)
        base_model = open_model(source)
        base = ServedModel(name, engine_of(base_model))
        if console is not None:
            console.print(escape(base_model.describe()))
        base_answers: dict[str, str] = {}
        store = Store(folder / STORE)
        opened.callback(store.close)
        answering = Answering(store, base)
        opened.callback(answering.close)

        def swap_in(run: int, run_folder: Path) -> None:
            trained = _trained(run, base_model, source.with_adapter(run_folder))
            prompts = _sample_prompts(store)
            new = [prompt for prompt in prompts if prompt not in base_answers]
            base_answers.update(zip(new, _answers(base.engine, new), strict=True))
            before, after = [base_answers[prompt] for prompt in prompts], _answers(trained.engine, prompts)
            store.runs.add_samples(run, list(zip(prompts, before, after, strict=True)))
            answering.models["trained"] = trained

        training = Training(store, folder / "runs", model, swap_in)
        opened.callback(training.close)
        importer = Importer(folder)
        opened.callback(importer.close)
        for run in store.runs.list():  # the newest that can be used
            try:
                if (run_folder := training.finished_folder(run)) is not None:
                    answering.models["trained"] = _trained(run["id"], base_model, _with_run(source, run_folder))
                    break
            except BuleyeanError as error:
                if console is not None:
                    console.print(f"[yellow]run {run['id']} cannot be used:[/] {escape(str(error))}")
        training.resume()
        training.warm_up()
        shut_down = opened.pop_all().close

    void = Void(store, answering, training, importer)
    hosts = LOOPBACK if token is None else None
    app = make_app(void, token=token, hosts=hosts, on_shutdown=shut_down)
    settings = uvicorn.Config(
        app, http=PromptProtocol, ws="none", log_level="error", timeout_graceful_shutdown=1, server_header=False
    )
    fragment = "" if token is None else f"#token={quote(token, safe='')}"
    return Server(uvicorn.Server(settings), void, [url + fragment for url in urls(host, port)])


def _choose_token(host: str) -> str | None:
    """The token of an address; None for one that only this machine reaches."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return None
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    if not re.fullmatch(r"[!-~]+", token):  # browsers send no other in a header
        raise UsageError(f"{TOKEN_VARIABLE} must be ASCII letters, digits and signs, without spaces: choose another")
    return token


def _with_run(source: Source, folder: Path) -> Source:
    """A base model with the adapter of a run, which must be its own."""
    trained_on = read_run(folder)["model"]
    if trained_on != source.absolute_name:
        raise ModelError(f"it was trained on {trained_on}")
    return source.with_adapter(folder)


def _sample_prompts(store: Store) -> list[str]:
    """The newest rejected prompts that a person might have asked: an imported one may be a book."""
    prompts = (row["prompt"] for row in store.rejections.page()["rows"])
    return list(dict.fromkeys(prompt for prompt in prompts if len(prompt) <= MAX_PROMPT))[:SAMPLES]


def _trained(run: int, base: Model, source: Source) -> ServedModel:
    """A run's model: its adapter on the base in memory."""
    return ServedModel(f"run {run}", engine_of(base.with_source(source)))


def _answers(engine: Engine, prompts: list[str]) -> list[str]:
    """The same as the page generates, so that they equal what was rejected: beside others only where that is so."""
    sampling, conversations = Sampling(max_tokens=MAX_TOKENS), [[{"role": "user", "content": each}] for each in prompts]
    if not engine.is_batched:
        return engine.complete_many(conversations, sampling)
    return ["".join(engine.generate(messages, sampling)) for messages in conversations]
