"""A Void in a process of its own that tests may kill, or in this one with a model that is none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from buleyean_rl.inference.protocol import GREEDY, Answer, BaseEngine, Messages, OnTokens, Outcome, Sampling
from buleyean_rl.void.answering import Answering
from buleyean_rl.void.app import make_app
from buleyean_rl.void.files import ModelFiles
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.models import BASE, Models, ServedModel
from buleyean_rl.void.services import Loading, Void
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import Timing, Timings
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
            reply = self.client.get("/api/state")  # refused without a token
            return reply.status_code == 401 or reply.json()["loading"] is None
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
        """A turn of a conversation of its own, when it is answered."""
        self.post("turns", **{"uid": uid, "conversation": uid, "prompt": prompt} | options).raise_for_status()
        unfinished = ("waiting", "writing")
        until(lambda: all(a["state"] not in unfinished for a in self.get(f"turns/{uid}")["answers"]), 60)
        return self.get(f"turns/{uid}")

    def reject(self, uid: str, answer: dict[str, Any], **options: Any) -> httpx2.Response:
        return self.post("rejections", uid=uid, answer=answer["id"], **options)

    def upload(self, uid: str, content: Any, again: bool = False, **query: str) -> httpx2.Response:
        """A file that is looked at and taken, unless it is refused."""
        headers = {"Content-Type": "application/octet-stream"}
        reply = self.client.post("/api/imports", params={"uid": uid} | query, content=content, headers=headers)
        return reply if reply.status_code != 200 else self.post(f"imports/{uid}/take", again=again)

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


class Echo(BaseEngine):
    """An engine that answers with what it was asked, word by word, and holds until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.heard: list[Messages] = []

    def tokenize(self, text: str, **_: Any) -> list[int]:
        return list(range(len(text.split())))

    def generate(
        self, messages: Messages, sampling: Sampling = GREEDY, begun: Sequence[int] = ()
    ) -> Generator[str, None, Answer]:
        self.heard.append(messages)
        words = messages[-1]["content"].split()
        last = len(begun) + sampling.max_tokens
        for word in words[len(begun) : last]:
            self.go.wait(30)
            yield f"{word} "
        text = "".join(f"{word} " for word in words[:last])
        return Answer(text, None, last >= len(words), tuple(range(min(last, len(words)))))

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,  # noqa: ARG002
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        for index, messages in enumerate(conversations):
            pieces = self.generate(messages, sampling)
            while True:
                try:
                    next(pieces)
                except StopIteration as end:
                    yield index, end.value
                    break
                if on_tokens is not None:
                    on_tokens(1)


@contextmanager
def void_in_process(
    folder: Path, *, token: str | None = None, model: str = "none", engine: Echo | None = None
) -> Iterator[tuple[Any, Void]]:
    """The application and its parts, with an engine that echoes; training fails, unless it is told a model."""
    store = Store(folder / "void.db")
    served = ServedModel(BASE, engine or Echo(), {"policy": {"model": "echo"}, "tokenizer": "0" * 32})  # type: ignore[arg-type]
    timings = Timings(store.settings, Timing(1, 1, 1))
    training = Training(store, folder / "runs", model, lambda _run, _folder: None, timings)

    def open_run(run: dict[str, Any]) -> ServedModel:
        return ServedModel(f"run-{run['id']}", Echo())  # type: ignore[arg-type]

    def problem_of(run: dict[str, Any]) -> str:
        return "" if (training.folder(run) / "run.json").exists() else "it has no model"

    models = Models(store, served, "echo", open_run, problem_of)
    answering, files = Answering(store, models), ModelFiles(folder / "files", 1_000)
    loading = Loading("echo")
    loading.void = Void(store, models, answering, training, files, Importer(folder))
    answering.begin()
    try:
        yield make_app(loading, token=token, hosts=None, on_shutdown=lambda: None), loading.void
    finally:
        served.engine.go.set()  # type: ignore[attr-defined]
        training.close()
        answering.close()
        files.close()
        loading.void.importer.close()
        store.close()
