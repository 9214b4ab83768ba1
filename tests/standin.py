"""A stand-in for an OpenAI-compatible server on the loopback interface, with every fault real ones have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn:
    """Answers each prompt with what `answer` makes of its last message; `faults` come first, one a request.

    A fault is a status to send, a pair of status and body, or "silence", "half", "hang up", "not json", "no choices".
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.faults: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.retry_after: str | None = None
        self.routes: dict[str, Callable[[dict[str, Any]], tuple[int, bytes]]] = {}  # replies of their own
        self.delay = 0.0
        self.concurrent = self.max_concurrent = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.url = ""

    def fault(self) -> Any:
        with self.lock:
            return self.faults.pop(0) if self.faults else None


@contextmanager
def standing_in(answer: Callable[[str], str] = str.upper) -> Iterator[StandIn]:
    state = StandIn(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": "the-model"}]}).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(request)
                state.keys.append(self.headers.get("Authorization"))
                state.concurrent += 1
                state.max_concurrent = max(state.max_concurrent, state.concurrent)
            time.sleep(state.delay)
            try:
                if (route := state.routes.get(self.path)) is not None:
                    self.reply(*route(request))
                else:
                    self.answer_or_fail(request)
            finally:
                with state.lock:
                    state.concurrent -= 1

        def answer_or_fail(self, request: dict[str, Any]) -> None:
            text = state.answer(request["messages"][-1]["content"])
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            match state.fault():
                case None:
                    self.reply(200, body)
                case int(status):
                    self.reply(status, b'{"error": {"message": "the reason"}}')
                case (int(status), bytes(content)):
                    self.reply(status, content)
                case "silence":
                    state.released.wait(5)
                    self.close_connection = True
                case "half":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                case "hang up":
                    self.close_connection = True
                case "not json":
                    self.reply(200, b"<html>Bad gateway</html>")
                case "no choices":
                    self.reply(200, b'{"choices": []}')

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            if status == 429 and state.retry_after is not None:
                self.send_header("Retry-After", state.retry_after)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
