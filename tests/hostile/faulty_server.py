"""A server that speaks HTTP by hand, so that it can speak it wrongly: faults of endpoints, by name."""

from __future__ import annotations

import gzip
import json
import math
import random
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

ELSEWHERE = "http://127.0.0.2:9/v1/chat/completions"
MIB = 1 << 20

Fault = Callable[[socket.socket, str], None]


def completion(content: Any, **choice: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}]}).encode()


def send(body: bytes, status: int = 200, *headers: str) -> Fault:
    """A whole reply."""
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers))

    def fault(connection: socket.socket, _key: str) -> None:
        connection.sendall(head.encode("latin-1") + b"\r\n")
        connection.sendall(body)

    return fault


def raw(data: bytes) -> Fault:
    """Some bytes, and the end."""
    return lambda connection, _key: connection.sendall(data)


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Fault:
    """A piece again and again, for 20 seconds at most."""

    def fault(connection: socket.socket, _key: str) -> None:
        connection.sendall(head)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(pause)

    return fault


@cache
def bomb(wbits: int) -> bytes:
    """64 MiB of zeros, compressed."""
    packer = zlib.compressobj(9, wbits=wbits)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(64)) + packer.flush()


def packed(encoding: str, body: bytes) -> Fault:
    return send(body, 200, f"Content-Encoding: {encoding}")


def reset(connection: socket.socket, _key: str) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def echo_key(status: int) -> Fault:
    """The key of the request, in the reply."""

    def fault(connection: socket.socket, key: str) -> None:
        body = completion(f"your key is {key}") if status == 200 else json.dumps({"error": f"bad key {key}"}).encode()
        send(body, status)(connection, key)

    return fault


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STATUSES = (
    *(204, 206, 299, 304, 400, 401, 402, 403, 404, 405, 408, 409, 418, 422, 425),
    *(451, 500, 501, 502, 503, 505, 599, 999),
)
WAITS = ("0", "-1", "nan", "inf", "1e9", "Fri, 31 Dec 9999 23:59:59 GMT", "?")

FAULTS: dict[str, Fault] = {
    **{f"status {code}": send(b'{"error": {"message": "no"}}', code) for code in STATUSES},
    **{f"redirect {code}": send(b"", code, f"Location: {ELSEWHERE}") for code in (301, 307)},
    "redirect to nowhere": send(b"", 302, "Location: http://[:::/"),
    **{f"retry after {wait}": send(b"", 429, f"Retry-After: {wait}") for wait in WAITS},
    "too long": send(b'{"error": {"code": "context_length_exceeded"}}', 400),
    "filtered": send(b'{"error": {"code": "content_filter"}}', 400),
    "filtered answer": send(completion("half of", finish_reason="content_filter")),
    "no body": send(b""),
    "html": send(b"<html>Bad gateway</html>", 200, "Content-Type: text/html"),
    "event stream": send(b"data: {}\n\ndata: [DONE]\n\n", 200, "Content-Type: text/event-stream"),
    "half json": send(completion("text")[:-9]),
    "wrong charset": send(completion("text"), 200, "Content-Type: application/json; charset=utf-7"),
    "not utf-8": send(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "utf-16": send('{"choices": 1}'.encode("utf-16")),
    "null": send(b"null"),
    "a number": send(b"1" * 9000),
    "nan": send(b"NaN"),
    "choices null": send(b'{"choices": null}'),
    "choice null": send(b'{"choices": [null]}'),
    "message a text": send(b'{"choices": [{"message": "hello"}]}'),
    "content a number": send(completion(7)),
    "content a list": send(completion([["x"]])),
    "usage a text": send(completion("text")[:-1] + b', "usage": "many"}'),
    "half surrogates": send(completion("a\ud800b\udfff")),
    "control characters": send(completion("\0\x1b[2J\x07\u202e\u2028")),
    "deep nesting": send(b'{"choices": ' + b"[" * 30_000),
    "deep nesting in an error": send(b'{"error": ' * 5_000 + b"1" + b"}" * 5_000, 400),
    "the key in an answer": echo_key(200),
    "the key in an error": echo_key(401),
    "a huge answer": send(completion("x" * 20 * MIB)),
    "a huge error": send(b"x" * 20 * MIB, 500),
    "endless body": endless(HEAD + b"\r\n", b" " * 65536),
    "slow body": endless(HEAD + b"Content-Length: 99999\r\n\r\n", b" ", 0.1),
    "silence": endless(b"", b"", 0.1),
    "hang up": raw(b""),
    "reset": reset,
    "no http": raw(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "half a status line": raw(b"HTTP/1."),
    "half the headers": raw(HEAD + b"Content-Le"),
    "endless headers": endless(HEAD, b"X-Y: " + b"z" * 1000 + b"\r\n"),
    "slow headers": endless(HEAD, b"X: y\r\n", 0.1),
    "endless 100": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "short body": raw(HEAD + b"Content-Length: 500\r\n\r\n{"),
    "negative length": raw(HEAD + b"Content-Length: -5\r\n\r\n{}"),
    "two lengths": raw(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x"),
    "chunked junk": raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunked without end": raw(CHUNKED + b"2\r\n{}\r\n"),
    "endless chunk": endless(CHUNKED + b"ffffffff\r\n", b" " * 65536),
    "endless trailers": endless(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n"),
    "cookies": send(completion("text"), 200, *(f"Set-Cookie: c{i}={'v' * 500}" for i in range(90))),
    "bad gzip": packed("gzip", b"no gzip at all"),
    "half a gzip": packed("gzip", gzip.compress(completion("text"))[:30]),
    "gzip bomb": packed("gzip", bomb(31)),
    "deflate bomb": packed("deflate", bomb(-15)),
    "double gzip bomb": packed("gzip, gzip", gzip.compress(bomb(31))),
    "nine encodings": packed(", ".join(["gzip"] * 9), b"x"),
    "unknown encoding": packed("rot13", b"punat"),
}  # fmt: skip


class FaultyServer:
    """Answers a prompt with its last word; after `sound` good replies come `times` faults, then good ones again.

    Args:
        url: of the endpoint.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fault: Fault | None = None
        self.sound, self.times = 0, 0.0
        self.keys: list[str] = []
        self._lock = threading.Lock()

    def break_with(self, fault: Fault | None, sound: int = 3, times: float = math.inf) -> None:
        self.fault, self.sound, self.times = fault, sound, times

    def next_fault(self, key: str) -> Fault | None:
        with self._lock:
            self.keys.append(key)
            if self.fault is None or self.sound > 0:
                self.sound -= 1
                return None
            self.times -= 1
            return self.fault if self.times >= 0 else None


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, ValueError):
                while request := self.read():
                    key, body = request
                    fault = state.next_fault(key)
                    if fault is not None:
                        fault(self.connection, key)
                        return
                    prompt = json.loads(body)["messages"][-1]["content"]
                    send(completion(f"answer {prompt.split()[-1]}"))(self.connection, key)

        def read(self) -> tuple[str, bytes] | None:
            key, size = "", 0
            while (line := self.rfile.readline().decode("latin-1").strip()) or not size:
                if not line:
                    return None
                name, _, value = line.partition(": ")
                size = int(value) if name.lower() == "content-length" else size
                key = value if name.lower() == "authorization" else key
            return key, self.rfile.read(size)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        block_on_close = False
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        state = FaultyServer(f"http://127.0.0.1:{server.server_address[1]}/v1#model")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def chosen_faults(number: int, seed: int) -> list[str]:
    """Names of faults: all, or a random sample."""
    names = list(FAULTS)
    return names if number >= len(names) else random.Random(seed).sample(names, number)
