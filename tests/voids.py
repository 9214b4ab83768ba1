"""A Void in a process of its own that tests may kill, or in this one with a model that is none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from buleyean_rl.inference.protocol import GREEDY, Messages, Sampling
from buleyean_rl.void.answering import Answering, ServedModel
from buleyean_rl.void.app import make_app
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.services import Void
from buleyean_rl.void.store import Store
from buleyean_rl.void.training import Training


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """A running `buleyean void`."""

    def __init__(self, model: Path, folder: Path, port: int, *words: str, **environment: str) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        arguments = ["void", "--model", str(model), "-o", str(folder), "--port", str(port), *words]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from buleyean_rl.cli import main; raise SystemExit(main({arguments!r}))"],
            stderr=subprocess.PIPE,
            env=os.environ | environment,
        )
        self.client = httpx2.Client(base_url=self.url, timeout=30, trust_env=False)
        until(lambda: self.listens(), 300)

    def listens(self) -> bool:
        assert self.process.poll() is None, self.process.stderr.read().decode()  # type: ignore[union-attr]
        try:
            return self.client.get("/").status_code == 200
        except httpx2.TransportError:
            return False

    def get(self, path: str) -> Any:
        return self.client.get(f"/api/{path}").raise_for_status().json()

    def finished(self, run: int) -> dict[str, Any]:
        """A run once it has ended."""
        return until(lambda: (row := self.get(f"runs/{run}"))["state"] not in ("running", "stopping") and row, 180)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(f"/api/{path}", json=body)

    def ask(self, uid: str, prompt: str, **options: Any) -> dict[str, Any]:
        """A question, when it is answered."""
        self.post("questions", uid=uid, prompt=prompt, **options).raise_for_status()
        until(lambda: all(answer["text"] is not None for answer in self.get(f"questions/{uid}")["answers"]), 60)
        return self.get(f"questions/{uid}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        self.client.close()
        self.process.send_signal(how)
        self.process.wait(30)
        self.process.stderr.close()  # type: ignore[union-attr]


@contextmanager
def running(model: Path, folder: Path, *words: str, **environment: str) -> Iterator[Process]:
    void = Process(model, folder, free_port(), *words, **environment)
    try:
        yield void
    finally:
        if void.process.poll() is None:
            void.stop()


def until(condition: Any, seconds: float) -> Any:
    """What a condition gives once it holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


def events(reply: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream."""
    for line in reply.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


class Echo:
    """An engine that answers with what it was asked."""

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Iterator[str]:  # noqa: ARG002
        yield from (f"You said {word} " for word in messages[-1]["content"].split()[:20])


@contextmanager
def void_in_process(folder: Path, *, token: str | None = None, model: str = "none") -> Iterator[tuple[Any, Void]]:
    """The application and its parts, with an engine that echoes; training fails, unless it is told a model."""
    store = Store(folder / "void.db")
    answering = Answering(store, ServedModel("echo", Echo()))  # type: ignore[arg-type]
    void = Void(store, answering, Training(store, folder / "runs", model, lambda _run, _folder: None), Importer(folder))
    try:
        yield make_app(void, token=token, hosts=None, on_shutdown=lambda: None), void
    finally:
        void.training.close()
        answering.close()
        store.close()
