"""Serve a model until it is interrupted: its engine started, its address taken, its front run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from buleyean_rl.inference.gguf_context import gguf_slots
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.live.app import make_app
from buleyean_rl.live.completions import DATABASE, CompletionStore
from buleyean_rl.live.engine import ServedEngine, Size
from buleyean_rl.live.gate import check
from buleyean_rl.live.keys import SERVE_VARIABLE, find_key
from buleyean_rl.live.serving import Serving
from buleyean_rl.live.target import Target, TargetQuery, find_target
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.system.wording import counted
from buleyean_rl.web.access import LOOPBACK, choose_token
from buleyean_rl.web.listener import Server, listen, urls

GRACE_SECONDS = 3  # for replies under way when the server ends; then they are told
KILL_SECONDS = 2


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        host: the address to listen on; one that others can reach needs a key.
        port: 0 for a free one.
        key_file: holds the key; None for the environment.
        context: tokens of a conversation; None for the model's own, as memory allows.
        slots: conversations at once; None for as many as memory allows.
        threads: None for the available cores.
        name: in the list of models; "" for the base model's.
        remember: folder of completions, for feedback; None for none.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key_file: Path | None = None
    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    name: str = ""
    remember: Path | None = None


def serve(name: str, lora: str | None, settings: Settings, console: Console) -> None:
    """Serve a model until it is interrupted.

    Args:
        name: a run folder, a model as for `train`, or a GGUF file.
        lora: an adapter GGUF for it; None for none.
        settings: address, key and size.
        console: where the address is said.

    Raises:
        UsageError: the address cannot be had, or the key is none.
        EngineError: there is no such model, or llama.cpp cannot run it.
    """
    key = find_key(SERVE_VARIABLE, settings.key_file)
    token = choose_token(settings.host, SERVE_VARIABLE, key)
    with ExitStack() as opened:
        listener = opened.enter_context(closing(listen(settings.host, settings.port)))
        completions = None if settings.remember is None else _open_folder(settings.remember, opened)
        asyncio.run(_serve(name, lora, settings, console, token, listener, completions))


def _open_folder(folder: Path, opened: ExitStack) -> CompletionStore:
    """The folder of completions, this process's alone until `opened` closes."""
    opened.enter_context(claim_folder(folder, lambda path: (path / DATABASE).exists(), "store of completions"))
    folder.chmod(0o700)
    return opened.enter_context(closing(CompletionStore(folder)))


class _Front(Server):
    """The front, which leaves signals to its caller."""

    def capture_signals(self) -> Any:
        """See uvicorn, which would raise them again."""
        return nullcontext()


async def _serve(
    name: str,
    lora: str | None,
    settings: Settings,
    console: Console,
    token: str | None,
    listener: socket.socket,
    completions: CompletionStore | None,
) -> None:
    target = await find_target(TargetQuery(os.path.expanduser(name), lora, tokenizer=completions is not None))
    size = await asyncio.to_thread(find_size, target, settings)

    async def start(wanted: Target) -> ServedEngine:
        return await ServedEngine.start(wanted, size)

    serving = Serving(settings.name or target.base, await start(target), start, check)
    loop, signals = asyncio.get_running_loop(), list[int]()
    app = make_app(serving, token=token, hosts=LOOPBACK if token is None else None, completions=completions)

    def let_go() -> None:
        loop.call_soon_threadsafe(loop.call_later, GRACE_SECONDS, serving.kill)

    front = _Front(app, GRACE_SECONDS + KILL_SECONDS, let_go)

    def end(number: int) -> None:
        signals.append(number)
        front.handle_exit(number, None)

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, end, number)
    serving.failed.add_done_callback(lambda _: setattr(front, "should_exit", True))
    try:
        _say(console, serving, size, urls(settings.host, listener.getsockname()[1]), token, settings)
        await front.serve(sockets=[listener])
    finally:
        await serving.close()
    if serving.failed.done():
        raise serving.failed.result()
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


def find_size(target: Target, settings: Settings) -> Size:
    """The size of the engines, from memory where the user does not say."""
    context, slots = gguf_slots(check_gguf(target.gguf), settings.context, settings.slots)
    return Size(context, slots, settings.threads)


def _say(
    console: Console, serving: Serving, size: Size, addresses: list[str], token: str | None, settings: Settings
) -> None:
    shown = " ".join(escape(f"{address}v1") for address in addresses)
    console.print(f"{escape(serving.name)} ({escape(serving.target.name)}) answers at [bold]{shown}[/]", soft_wrap=True)
    console.print(f"{counted(size.slots, 'conversation')} at once, {size.context:,} tokens each; Ctrl-C ends it")
    if token is not None and settings.key_file is None and not os.environ.get(SERVE_VARIABLE):
        console.print(f"the key is {escape(token)}; {SERVE_VARIABLE} or --api-key sets another", soft_wrap=True)
