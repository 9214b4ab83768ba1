"""The Void under attack: hostile requests, half requests, kills, two on one folder."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import httpx2
import pytest

from asgi import BINARY, JSON, Reply, send
from buleyean_rl.data.records import make_record
from buleyean_rl.void.app import ROUTES
from buleyean_rl.void.store import ImportedFile, Store, TurnSettings
from buleyean_rl.void.store.rejections import record_rows
from hostile.attack import HANG_SECONDS, run_process
from hostile.disk import small_disk
from hostile.scale import runs as scaled
from voids import Process, free_port, until, void_in_process

pytestmark = pytest.mark.slow

SEED = 33
PATHS = [route.path for route in ROUTES]
METHODS = ("GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "")
FIELDS = (
    *("uid", "prompt", "blind", "conversation", "answer", "slot", "spans", "reason", "steps", "name", "again", "title"),
    *("system", "temperature", "max_tokens", "models", "prompts", "ids", "verdict"),
)
ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "a", "\x00", "\ud800", "\udfff\ud800", "💥", "a" * 9_000, "../../etc/passwd", "%00", "' OR 1=1 --"),
    *("asked-0001", "<script>", "\u202e", "1e999", [], {}, [[]], [[0, 1]], [[1, 0]], [[0, 1 << 63]], [0, 1], {"0": 1}),
)
FILES = (
    b'{"prompt": "p", "rejected": "a"}\n',
    b'{"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [1, 0], "total_rounds": 1}\n',
    b"question;reply;vote\nq;a;0\n",
    b'[{"prompt": "p", "chosen": "a", "rejected": "b"}]',
    b'{"prompt": "p", "rejected": "\\ud800"}\n',
    b"\x1f\x8b\x08\x00" + b"\xff" * 40,
    b"PAR1" + b"\x00" * 40,
)


def a_body(draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return draw.choice([b"[" * 50_000, b'{"a":' * 50_000, b"", b"null", b"0" * 6_000, b"\xff\xfe", b" " * 300_000])
    fields = {name: draw.choice(ATOMS) for name in draw.sample(FIELDS, draw.randrange(len(FIELDS)))}
    if draw.random() < 0.5:  # all right but for one field
        right = {
            "uid": f"hostile-{draw.randrange(9)}",
            "prompt": "hi",
            "conversation": "talk-0001",
            "answer": 1,
            "slot": 0,
            "spans": [],
        }
        fields = right | dict(list(fields.items())[:1])
    body = json.dumps(fields).encode()
    if kind == 2:
        at = draw.randrange(len(body))
        body = body[:at] + draw.randbytes(3) + body[at + draw.randrange(4) :]
    return body


def a_path(draw: random.Random) -> str:
    path = draw.choice(PATHS)
    for name in ("{id}", "{uid}", "{kind}", "{secret}", "{name}"):
        value = draw.choice(ATOMS)
        path = path.replace(
            name, draw.choice(["1", "asked-0001", "q8_0", str(value) if not isinstance(value, str) else value])
        )
    if draw.random() < 0.1:
        path += draw.choice(["/", "/..", "/undo", "\x00", "//", "?", "#"])
    return path


def headers(draw: random.Random) -> list[tuple[bytes, bytes]]:
    sent = list(draw.choice([JSON, BINARY]))
    if draw.random() < 0.2:
        name = draw.choice(
            [b"authorization", b"origin", b"host", b"content-type", b"content-length", b"range", b"cookie"]
        )
        sent.append(
            (name, draw.choice([b"", b"\xff\xfe", b"Bearer \xc5\xbe", b"bytes=9-1", b"-1", b"http://x", b"a" * 9_000]))
        )
    return sent


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Any]:
    with void_in_process(tmp_path) as (app, void):
        asked = json.dumps({"uid": "asked-0001", "conversation": "talk-0001", "prompt": "hello there"}).encode()
        assert asyncio.run(send(app, "POST", "/api/turns", headers=JSON, body=asked)).status == 200
        assert asyncio.run(send(app, "GET", "/api/turns/asked-0001/stream", headers=JSON)).status == 200
        void.training.start = lambda _uid, _steps: None  # type: ignore[method-assign]
        yield app


def test_hostile_requests(app: Any) -> None:
    """Thousands of requests: each is answered, none by an error of the server's, and the store still works."""
    draw = random.Random(SEED)

    async def attack() -> None:
        for number in range(scaled(40_000)):
            method, path = draw.choice(METHODS), a_path(draw)
            query = quote_from_bytes(draw.randbytes(9), safe="=&").encode() if draw.random() < 0.3 else b"page=1"
            if path in ("/api/imports", "/api/batches/prompts"):
                query = b""  # see the files below
            request = send(app, method, path, query=query, headers=headers(draw), body=a_body(draw), seconds=0.01)
            reply = await asyncio.wait_for(request, HANG_SECONDS)
            assert reply.status < 500, (number, method, path, reply)

    asyncio.run(attack())
    assert asyncio.run(send(app, "GET", "/api/state", headers=JSON)).status == 200
    assert asyncio.run(send(app, "GET", "/api/export", headers=JSON)).status == 200


async def take(app: Any, query: bytes, content: bytes) -> Reply:
    """A file that is looked at and taken, unless it is refused."""
    preview = await send(app, "POST", "/api/imports", query=query, headers=BINARY, body=content)
    if preview.status != 200:
        return preview
    path = f"/api/imports/{preview.json()['uid']}/take"
    return await send(app, "POST", path, headers=JSON, body=b'{"again": true}')


def test_hostile_files(app: Any) -> None:
    """Mutated files: each is imported or refused with its reason, and all that was imported can be exported."""
    draw = random.Random(SEED)

    async def attack() -> None:
        for number in range(scaled(800)):
            content = bytearray(draw.choice(FILES) * draw.choice([1, 3]))
            for _ in range(draw.randrange(4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
            name = draw.choice(
                [b"x.jsonl", b"x.json", b"x.csv", b"x.parquet", b"x.jsonl.gz", b"", b"..", b"%00", b"%ff"]
            )
            columns = draw.choice([b"", b"&prompt=question&answer=reply", b"&prompt=prompt&answer=rejected&below=1e9"])
            query = b"uid=upload-%d&name=%s%s" % (number, name, columns)
            reply = await asyncio.wait_for(take(app, query, bytes(content)), HANG_SECONDS)
            assert reply.status in (200, 400), (number, bytes(content), reply)
            assert reply.status == 200 or reply.json()["error"]
            assert "Traceback" not in reply.body.decode()

    asyncio.run(attack())
    assert asyncio.run(send(app, "GET", "/api/export", headers=JSON)).status == 200


# Texts of some size that are slow to read for one reason or another.
HEAVY = (
    lambda n: b'{"prompt": "p", "rejected": "' + b"a@" * (n // 2) + b'"}',
    lambda n: b"{" + b",".join(b'"k%d": 1' % k for k in range(n // 10)) + b"}",
    lambda n: json.dumps({"prompt": "p", "rejected": [str(k) for k in range(n // 10)]}).encode(),
    lambda n: b"\n".join(b'{"prompt": "p", "rejected": "%d"}' % k for k in range(n // 40)),
    lambda n: b'{"prompt": "p", "rejected": "' + b'\\"' * (n // 2) + b'"}',
    lambda n: b'{"prompt": "p", "rejected": "' + b"<think>" * (n // 7) + b'"}',
    lambda n: b"[" * n,
    lambda n: b'"' * n,
    lambda n: b"a,b\n" + b'"' * n,
)


def test_heavy_text_keeps_nobody_waiting(app: Any) -> None:
    """While 5 MB are read, every other request is answered within two seconds."""
    size = 5_000_000

    async def attack(content: bytes, name: bytes, number: int) -> None:
        query = b"uid=upload-%d&name=%s" % (number, name)
        reading = asyncio.create_task(take(app, query, content))
        while not reading.done():
            sent = time.monotonic()
            assert (await send(app, "GET", "/api/rejections", headers=JSON)).status == 200
            assert time.monotonic() - sent < 2
            await asyncio.sleep(0.05)
        assert (await reading).status in (200, 400)

    for number, kind in enumerate(HEAVY[: scaled(60)]):
        for name in (b"x.jsonl", b"x.csv"):
            asyncio.run(asyncio.wait_for(attack(kind(size), name, 10 * number + len(name)), 2 * HANG_SECONDS))


def test_half_requests_are_closed_and_others_answered(base: Path, tmp_path: Path) -> None:
    void = Process(base, tmp_path, free_port())
    try:
        heads = [
            b"",
            b"G",
            b"GET / HTTP/1.1\r\n",
            b"POST /api/turns HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9",
        ]
        heads.append(
            b"POST /api/turns HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        lines = [socket.create_connection(("127.0.0.1", void.port)) for _ in range(scaled(400))]
        begun = time.monotonic()
        for number, line in enumerate(lines):
            line.sendall(heads[number % len(heads)])
        while time.monotonic() < begun + 8:  # they trickle
            for number, line in enumerate(lines):
                if number % len(heads) in (3, 4):
                    line.sendall(b" ")
            assert void.client.get("/api/state").status_code == 200
            time.sleep(0.5)
        for line in lines:
            line.settimeout(max(1.0, begun + 25 - time.monotonic()))
            with closing(line):
                while line.recv(1024):  # what it may be told before it is closed
                    pass
    finally:
        void.stop()


def write_until_killed(path: Path, life: int, acknowledge: Any) -> None:
    """What every part of the server writes, each thing acknowledged once it is written."""
    store = Store(path)
    acknowledge.send(("life", str(life)))
    for number in itertools.count():
        uid = f"life-{life}-{number}"
        assert store.conversations.ask(uid, f"talk-{life}", "hello", TurnSettings(), [("base", "m")])
        acknowledge.send(("turns", uid))
        answer = store.conversations.turn(uid)["answers"][0]  # type: ignore[index]
        store.conversations.save(answer, f"words {uid}", "done")
        acknowledge.send(("answers", f"words {uid}"))
        row = store.rejections.add(uid, answer | {"text": f"words {uid}"})["id"]
        acknowledge.send(("rejections", uid))
        if number % 3 == 0:
            store.rejections.undo([row])
            acknowledge.send(("undone", uid))
        records = [make_record(f"{uid} {n}", ["a"]) for n in range(9)]
        rows = (row for record in records for row in record_rows(record))
        store.imports.add(ImportedFile(f"import-{uid}", uid, "x.jsonl"), "records", 9, rows)
        acknowledge.send(("imports", f"import-{uid}"))


def test_kills_of_the_store_lose_nothing(tmp_path: Path) -> None:
    """A process that writes is killed at any moment: what it acknowledged is there, and no half of an import is."""
    draw, path, acknowledged = random.Random(SEED), tmp_path / "void.db", set[tuple[str, str]]()
    fork = multiprocessing.get_context("fork")
    for life in range(scaled(100)):
        hears, acknowledge = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_until_killed, args=(path, life, acknowledge))
        writer.start()
        acknowledge.close()
        time.sleep(draw.uniform(0, 0.5))
        writer.kill()
        writer.join()
        with suppress(EOFError):
            while True:
                acknowledged.add(hears.recv())
        hears.close()
        with closing(Store(path)) as store:
            stored = {("life", str(each)) for each in range(life + 1)}
            columns = {"turns": "id", "answers": "text", "rejections": "uid", "imports": "uid"}
            for table, column in columns.items():
                stored |= {(table, row["it"]) for row in store.database.all(f"SELECT {column} AS it FROM {table}")}
            gone = store.database.all("SELECT uid FROM rejections WHERE undone IS NOT NULL AND source = 'page'")
            assert acknowledged <= stored | {("undone", row["uid"]) for row in gone}
            half = "SELECT import FROM rejections WHERE import IS NOT NULL GROUP BY import HAVING COUNT(*) < 9"
            shown = {row["id"] for row in store.imports.list()}
            assert shown.isdisjoint(row["import"] for row in store.database.all(half))
    assert acknowledged


def kill_while_it_starts(base: Path, folder: Path, seconds: float) -> None:
    starting = subprocess.Popen(
        [sys.executable, "-m", "buleyean_rl", "void", "--model", base, "-o", folder, "--port", str(free_port())],
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    assert starting.poll() is None
    starting.kill()
    starting.wait(HANG_SECONDS)


def test_kills_lose_nothing_that_was_acknowledged(base: Path, tmp_path: Path) -> None:
    """Killed while it starts, answers, trains, imports: what it acknowledged is there, and no run is left running."""
    draw = random.Random(SEED)
    acknowledged, imported = dict[int, str](), set[str]()
    for life in range(max(2, scaled(100))):
        if draw.random() < 0.3:
            kill_while_it_starts(base, tmp_path, draw.uniform(0.1, 5))
        void = Process(base, tmp_path, free_port())
        asked = f"life-{life:04}"
        answer = void.ask(asked, "Give me a tip.", max_tokens=32)["answers"][0]
        length = len(answer["text"])
        if not void.get("models")["runs"] or void.get("state")["run"] is None:
            void.reject(f"first-{life:04}", answer).raise_for_status()
            void.post("runs", uid=f"run-{life:04}", steps=40).raise_for_status()
        threading.Timer(draw.uniform(0.1, 6), void.process.send_signal, [signal.SIGKILL]).start()
        number = 0
        while True:
            try:
                uid = f"reject-{life:04}-{number}"
                start = number % length  # another part each time
                reply = void.reject(uid, answer, spans=[[start, start + 1 + number // length % (length - start)]])
                acknowledged[reply.raise_for_status().json()["id"]] = uid
                if number % 20 == 0:
                    row = json.dumps({"prompt": uid, "rejected": "a"}).encode()
                    void.upload(f"import-{uid}", row).raise_for_status()
                    imported.add(f"import-{uid}/0")
            except httpx2.TransportError:
                break
            number += 1
        void.process.wait(HANG_SECONDS)
        void.client.close()
        void.process.stderr.close()  # type: ignore[union-attr]
        with closing(Store(tmp_path / "void.db")) as store:
            rows = store.database.all("SELECT id, uid FROM rejections WHERE undone IS NULL")
            assert acknowledged.keys() <= {row["id"] for row in rows}
            assert imported <= {row["uid"] for row in rows}
    with_runs = Process(base, tmp_path, free_port())
    try:
        until(lambda: with_runs.get("state")["run"] is None, 4 * HANG_SECONDS)
        assert {run["state"] for run in with_runs.get("models")["runs"]} <= {"done", "failed"}
        assert "done" in {run["state"] for run in with_runs.get("models")["runs"]}
    finally:
        with_runs.stop()


def test_two_at_once(base: Path, tmp_path: Path) -> None:
    """The second is told who holds the folder, and the first goes on."""
    void = Process(base, tmp_path, free_port())
    try:
        for _ in range(max(1, scaled(20))):
            outcome = run_process("void", "--model", base, "-o", tmp_path, "--port", str(free_port()))
            assert outcome.code == 2
            assert f"process {void.process.pid}" in outcome.err
            assert "Traceback" not in outcome.err
        assert void.get("state")["rejections"] == 0
    finally:
        void.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8 << 20) as folder:
        yield folder


def test_a_full_disk(base: Path, disk: Path) -> None:
    """Whatever is left of the disk: 507 or done, no run that seems to run for ever, and with space all goes on."""
    draw = random.Random(SEED)
    void, ballast, accepted = Process(base, disk / "void", free_port()), disk / "ballast", 0
    try:
        answer = void.ask("asked-0001", "Give me a tip.", max_tokens=128)["answers"][0]
        void.reject("first-001", answer).raise_for_status()
        for level in range(max(2, scaled(40))):
            spare = draw.choice([0, 4, 40, 200, 600, 2_000]) * 1024
            free = shutil.disk_usage(disk).free
            ballast.write_bytes(b"x" * max(0, free - spare))
            reply = void.post("runs", uid=f"run-{level:05}", steps=20)
            assert reply.status_code in (200, 507), reply.text
            for number in range(20):
                uid, reason = f"more-{level:03}-{number}", "why " * 200
                row = {"prompt": uid, "rejected": reason}
                reply = void.upload(uid, json.dumps(row).encode())
                assert reply.status_code in (200, 507), reply.text
                accepted += reply.status_code == 200
            until(lambda: void.get("state")["run"] is None, 2 * HANG_SECONDS)
            assert all(run["state"] in ("done", "failed") for run in void.get("models")["runs"])
            ballast.unlink()
            row = {"prompt": f"last {level}", "rejected": "a"}
            assert void.upload(f"last-{level:05}", json.dumps(row).encode()).status_code == 200
            accepted += 1
            for folder in (disk / "void" / "runs").glob("run-*"):  # the disk stays small
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        assert void.get("state")["rejections"] == 1 + accepted
        void.stop(signal.SIGKILL)
        void = Process(base, disk / "void", free_port())
        assert void.get("state")["rejections"] == 1 + accepted
        assert void.get("state")["run"] is None
    finally:
        void.stop()
