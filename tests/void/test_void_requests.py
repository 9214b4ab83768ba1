"""No request is an error of the server's: every route, every field, every type."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi import BINARY, JSON, Reply, call, send
from buleyean_rl.void.app import ROUTES, make_app
from buleyean_rl.void.files import KINDS
from buleyean_rl.void.services import Loading
from buleyean_rl.web import body as web_body
from voids import until, void_in_process

UID = "asked-0001"
STREAM_SECONDS = 0.05


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with void_in_process(tmp_path_factory.mktemp("requests")) as (app, void):
        ask(app, UID)
        assert call(app, "POST", "/api/rejections", {"uid": "reject-01", "answer": 1}).status == 200
        batch = {"uid": "batch-001", "prompts": ["one", "two"]}
        assert call(app, "POST", "/api/batches", batch).status == 200
        void.training.start = lambda _uid, _steps: None  # type: ignore[method-assign]
        void.importer.read_prompts = lambda _content, _name: ["p"]  # type: ignore[method-assign]
        yield app


# Half surrogates, and NUL, among all others.
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
IDS = st.one_of(
    st.integers((1 << 63) - 1, 10**19 - 1).map(str),
    st.sampled_from(["0", "1", "2", "1" * 5000, "-1", "1.0", "٣", "1e3", "0x1", "", "%"]),
    TEXT,
)
NUMBERS = st.one_of(st.integers(-1, 2), st.integers(), st.integers(min_value=1 << 63), st.floats())
SPANS = st.lists(st.lists(st.one_of(NUMBERS, st.none(), st.booleans()), max_size=3), max_size=3)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.just(UID)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "uid": st.one_of(st.from_regex(r"[A-Za-z0-9-]{8,64}", fullmatch=True), VALUES),
    "prompt": st.one_of(TEXT, VALUES),
    "blind": st.one_of(st.booleans(), VALUES),
    "conversation": st.one_of(st.just(UID), VALUES),
    "system": st.one_of(TEXT, VALUES),
    "temperature": st.one_of(st.floats(0, 2), VALUES),
    "max_tokens": st.one_of(st.integers(1, 9), VALUES),
    "models": st.one_of(st.just(["base"]), st.lists(st.sampled_from(["base", "run-1", "run-x", ""])), VALUES),
    "prompts": st.one_of(st.lists(TEXT, max_size=3), VALUES),
    "ids": st.one_of(st.lists(NUMBERS, max_size=3), VALUES),
    "answer": st.one_of(st.integers(0, 3), VALUES),
    "verdict": st.one_of(st.sampled_from(["rejected", "fine", "skipped", None]), VALUES),
    "name": st.one_of(TEXT, VALUES),
    "title": st.one_of(TEXT, VALUES),
    "again": st.one_of(st.booleans(), VALUES),
    "slot": st.one_of(st.integers(0, 1), VALUES),
    "spans": st.one_of(SPANS, VALUES),
    "reason": st.one_of(TEXT, VALUES),
    "steps": st.one_of(st.integers(1, 10), VALUES),
}
QUERIES = ("uid", "name", "q", "before", "prompt", "answer", "score", "system", "below", "page", "from", "count")
FILES = st.one_of(
    st.binary(max_size=60),
    st.fixed_dictionaries({"prompt": VALUES, "rejected": VALUES}).map(lambda row: json.dumps(row).encode()),
)


@st.composite
def hostile_requests(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """A method, a path and the rest of a request to one of the routes."""
    route = draw(st.sampled_from(ROUTES))
    path = route.path
    uids, kinds = st.one_of(st.sampled_from([UID, "batch-001"]), TEXT), st.sampled_from([*KINDS, "..", "x"])
    for name, values in (("{id}", IDS), ("{uid}", uids), ("{kind}", kinds), ("{secret}", TEXT), ("{name}", TEXT)):
        path = path.replace(name, draw(values))
    body = json.dumps(draw(st.fixed_dictionaries({}, optional=FIELDS))).encode()
    body = draw(st.sampled_from([body, body, body, b"[" * 100_000, b"\xff"]))
    query = {name: draw(TEXT) for name in draw(st.sets(st.sampled_from(QUERIES), max_size=4))}
    headers = draw(st.sampled_from([JSON, JSON, BINARY]))
    if path == "/api/imports":  # reading takes a process
        body, query = b"", {"uid": draw(TEXT)} | query
    raw_query = draw(st.one_of(st.just(urlencode(query, errors="surrogatepass").encode()), st.binary(max_size=20)))
    others = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "X"])
    method = draw(st.one_of(st.sampled_from(sorted(route.methods or {"GET"})), others))
    return method, path, {"query": raw_query, "headers": headers, "body": body, "seconds": STREAM_SECONDS}


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(request=hostile_requests())
def test_no_request_is_an_error_of_the_servers(app: Any, request: tuple[str, str, dict[str, Any]]) -> None:
    method, path, options = request
    reply = asyncio.run(send(app, method, path, **options))
    assert reply.status < 500
    if reply.status >= 400 and method != "HEAD":
        assert reply.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/rejections/9223372036854775808/undo", {}, 404),
        ("/api/rejections/undo", {"ids": [1 << 63]}, 400),
        ("/api/rejections/undo", {"ids": [True]}, 400),
        ("/api/answers/9223372036854775808/again", {}, 404),
        (f"/api/rejections/{'9' * 5000}/reason", {"reason": "x"}, 404),
        ("/api/imports/9223372036854775808/undo", {}, 404),
        ("/api/runs/9223372036854775808/stop", {}, 404),
        ("/api/rejections", {"uid": "reject-02", "answer": 1, "spans": None}, 400),
        ("/api/rejections", {"uid": "reject-02", "answer": 1, "spans": {}}, 400),
        ("/api/rejections", {"uid": "reject-02", "answer": 1, "spans": [[0, 1 << 70]]}, 400),
        ("/api/rejections", {"uid": "reject-02", "answer": 1 << 64}, 400),
        ("/api/rejections", {"uid": "reject-02", "answer": 1, "reason": "\udfff"}, 400),
        ("/api/turns", {"uid": "asked-0002", "conversation": "talk-0001", "prompt": "hi", "blind": "no"}, 400),
        ("/api/turns", {"uid": "asked-0002", "conversation": "talk-0001", "prompt": "hi", "temperature": 9}, 400),
        ("/api/turns", {"uid": "asked-0002", "conversation": "talk-0001", "prompt": "hi", "models": ["run-7"]}, 400),
        ("/api/turns", {"uid": "asked-0002", "conversation": "\ud800", "prompt": "hi"}, 400),
        ("/api/pair", {"models": ["base", "base"]}, 400),
    ],
)
def test_what_the_store_cannot_hold_is_refused(app: Any, path: str, body: dict[str, Any], status: int) -> None:
    reply = call(app, "POST", path, body)
    assert reply.status == status
    assert reply.json()["error"]


@pytest.mark.parametrize("presented", [b"", b"Bearer ", "Bearer žluť".encode(), b"Bearer \xff\x00", b"the-token"])
def test_no_other_token_is_an_error(tmp_path: Path, presented: bytes) -> None:
    with void_in_process(tmp_path, token="the-token") as (app, _):
        wrong = call(app, "GET", "/api/state", headers=[*JSON, (b"authorization", presented)])
        assert wrong.status == 401
        assert ("is needed" if not presented else "is not the one") in wrong.json()["error"]
        assert call(app, "GET", "/api/state", headers=[*JSON, (b"authorization", b"Bearer the-token")]).status == 200


def test_while_the_model_is_loaded_the_page_is_there_and_says_so() -> None:
    app = make_app(Loading("smollm2-135m"), token=None, hosts=None, on_shutdown=lambda: None)
    assert call(app, "GET", "/").status == 200
    assert call(app, "GET", "/api/state").json() == {
        "loading": {"what": "smollm2-135m", "share": None, "seconds_left": None}
    }
    for path in ("/api/models", "/api/rejections", "/api/turns/asked-0001"):
        reply = call(app, "GET", path)
        assert (reply.status, "being loaded" in reply.json()["error"]) == (503, True)


def test_a_query_that_is_no_text_is_no_error(app: Any) -> None:
    for path in ("/api/rejections/1/undo", "/api/imports/1/undo", "/api/state/"):
        assert call(app, "POST", path, {}, query=b"\xff").status < 500


class Slow:
    """A client that sends a byte a tenth of a second, for ever."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        self.sent += 1
        return {"type": "http.request", "body": b" ", "more_body": True}


def test_a_body_that_trickles_is_given_up(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_body, "BODY_SECONDS", 0.2)
    scope = {"type": "http", "method": "POST", "path": "/api/turns", "query_string": b"", "headers": JSON}
    scope |= {"raw_path": b"/api/turns", "root_path": "", "scheme": "http", "http_version": "1.1"}
    heard: list[dict[str, Any]] = []

    async def hear(message: dict[str, Any]) -> None:
        heard.append(message)

    client = Slow()
    asyncio.run(asyncio.wait_for(app(scope, client, hear), 20))
    assert heard[0]["status"] == 408
    assert (b"connection", b"close") in heard[0]["headers"]
    assert client.sent


def test_a_full_disk_is_answered_507_and_nothing_is_lost(tmp_path: Path) -> None:
    with void_in_process(tmp_path) as (app, void):
        ask(app, "asked-0001")
        (pages,) = void.store.database.all("PRAGMA page_count")
        limit = f"PRAGMA max_page_count = {pages['page_count']}"
        void.store.database._writer.execute(limit)  # as if the file could not grow
        names = [f"asked-00{number}" for number in range(10, 20)]
        long = [{"uid": name, "conversation": name, "prompt": "word " * 1500} for name in names]
        statuses = {call(app, "POST", "/api/turns", body).status for body in long}
        assert 507 in statuses
        assert statuses <= {200, 507}
        full = upload(app, "upload-01", {"prompt": "p", "rejected": "words " * 10_000})
        assert (full.status, "disk is full" in full.json()["error"]) == (507, True)
        assert call(app, "GET", "/api/turns/asked-0001").status == 200
        void.store.database._writer.execute("PRAGMA max_page_count = 1000000")
        assert upload(app, "upload-01", {"prompt": "p", "rejected": "words " * 10_000}).status == 200


def ask(app: Any, uid: str) -> None:
    asked = {"uid": uid, "conversation": uid, "prompt": "hello there"}
    assert call(app, "POST", "/api/turns", asked).status == 200
    assert call(app, "GET", f"/api/turns/{uid}/stream").status == 200  # ends when it is answered


def look(app: Any, uid: str, content: Any, **query: str) -> Reply:
    """A file's preview."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    names = urlencode({"uid": uid, "name": "log.jsonl"} | query, quote_via=quote).encode()
    return asyncio.run(send(app, "POST", "/api/imports", query=names, headers=BINARY, body=body))


def upload(app: Any, uid: str, content: Any, again: bool = False, **query: str) -> Reply:
    """A file that is looked at and taken, unless it is refused."""
    preview = look(app, uid, content, **query)
    return preview if preview.status != 200 else call(app, "POST", f"/api/imports/{uid}/take", {"again": again})


def test_imports_are_known_by_their_bytes_and_undone_as_one(tmp_path: Path) -> None:
    row = {"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [2, 0], "total_rounds": 2}
    with void_in_process(tmp_path) as (app, _):
        first = upload(app, "upload-01", row)
        assert (first.status, first.json()["rejections"], first.json()["records"]) == (200, 1, 1)
        assert upload(app, "upload-01", row).json()["id"] == first.json()["id"]  # sent again
    with void_in_process(tmp_path) as (app, _):  # after a restart
        asked = upload(app, "upload-02", row, name="other.jsonl")
        assert (asked.status, asked.json()["earlier"]["name"]) == (409, "log.jsonl")
        again = upload(app, "upload-02", row, again=True)
        assert again.status == 200
        assert call(app, "GET", "/api/state").json()["rejections"] == 2
        for imported in call(app, "GET", "/api/imports").json()["imports"]:
            assert call(app, "POST", f"/api/imports/{imported['id']}/undo", {}).status == 200
        assert call(app, "GET", "/api/state").json()["rejections"] == 0
        assert call(app, "GET", "/api/export").body == b""
        assert call(app, "POST", f"/api/imports/{first.json()['id']}/redo", {}).status == 200
        assert call(app, "GET", "/api/export").json()["rejection_counts"] == [2, 0]


def test_a_file_is_looked_at_before_it_is_taken(tmp_path: Path) -> None:
    row = {"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [2, 0], "total_rounds": 2}
    with void_in_process(tmp_path) as (app, _):
        seen = look(app, "upload-01", row).json()
        assert (seen["records"], seen["rejections"], seen["earlier"]) == (1, 1, None)
        assert seen["sample"] == [{"prompt": "p", "answer": "a"}]
        assert call(app, "GET", "/api/state").json()["rejections"] == 0
        assert call(app, "POST", "/api/imports/upload-01/drop", {}).status == 200
        gone = call(app, "POST", "/api/imports/upload-01/take", {})
        assert (gone.status, "choose it again" in gone.json()["error"]) == (404, True)
        assert upload(app, "upload-02", row).status == 200
        assert look(app, "upload-03", row).json()["earlier"]["uid"] == "upload-02"
        for number in range(6):  # of many the last are remembered
            look(app, f"upload-1{number}", row)
        assert len(list(tmp_path.glob(".import*"))) <= 4
    assert not list(tmp_path.glob(".import*"))


def test_a_table_of_its_own_is_read_by_the_columns_that_are_named(tmp_path: Path) -> None:
    table = b"when;question;reply;stars\nmon;Why?;Because.;1\ntue;How?;So.;5\n"
    with void_in_process(tmp_path) as (app, _):
        asked = upload(app, "upload-01", table, name="ours.csv")
        assert asked.status == 400
        assert asked.json()["columns"] == ["when", "question", "reply", "stars"]
        assert asked.json()["sample"][0]["reply"] == "Because."
        half = upload(app, "upload-01", table, name="ours.csv", prompt="question")
        assert (half.status, "prompt and the answer" in half.json()["error"]) == (400, True)
        named = {"name": "ours.csv", "prompt": "question", "answer": "reply", "score": "stars", "below": "3"}
        assert upload(app, "upload-01", table, **named | {"below": "nan"}).status == 400
        seen = look(app, "upload-01", table, **named).json()
        assert (seen["rejections"], seen["columns"]) == (1, asked.json()["columns"])
        assert any("1" in note for note in seen["notes"])  # what was left out is said
        taken = upload(app, "upload-01", table, **named)
        assert (taken.status, taken.json()["rejections"]) == (200, 1)
        record = call(app, "GET", "/api/export").json()
        assert (record["prompt"], record["rejected_responses"]) == ("Why?", ["Because."])


def test_half_a_surrogate_pair_in_a_file_of_no_known_format_is_shown_replaced(tmp_path: Path) -> None:
    with void_in_process(tmp_path) as (app, _):
        asked = upload(app, "upload-01", b'{"prompt": "p", "re\\ud800ly": "\\ud800"}\n')
        assert (asked.status, asked.json()["columns"]) == (400, ["prompt", "re\ufffdly"])
        assert asked.json()["sample"] == [{"prompt": "p", "re\ufffdly": "\ufffd"}]


def test_an_import_that_takes_too_long_or_too_much_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from buleyean_rl.void import importing

    with void_in_process(tmp_path) as (app, _):
        monkeypatch.setattr(importing, "MAX_SECONDS", 0.01)
        slow = upload(app, "upload-01", {"prompt": "p", "rejected": "a"})
        assert (slow.status, "seconds to read" in slow.json()["error"]) == (400, True)
        monkeypatch.setattr(importing, "MAX_SECONDS", 60)
        large = upload(app, "upload-01", {"prompt": "p", "rejected": [str(n) for n in range(100_001)]})
        assert (large.status, "more than 100,000 answers" in large.json()["error"]) == (400, True)
        assert upload(app, "upload-01", {"prompt": "p", "rejected": "a"}).status == 200
        assert not list(tmp_path.glob(".import*"))


def test_a_server_that_ends_waits_for_no_import(tmp_path: Path) -> None:
    from buleyean_rl.void.importing import Importer, UnreadableFile
    from buleyean_rl.void.store import ImportedFile

    importer, problems = Importer(tmp_path), []

    def read() -> None:
        try:
            importer.read_upload(b'{"prompt": "p", "rejected": "a"}', ImportedFile("uid", "0", "r.jsonl"), {}, None)
            problems.append("it is read")
        except UnreadableFile as error:
            problems.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: importer._process is not None, 10)  # which takes a second to start
    importer.close()
    assert not list(tmp_path.iterdir())
    reader.join()
    read()
    assert problems == ["is not imported: the server ends; import it again"] * 2


def test_an_import_that_is_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Reading is hostile text's; every other request is answered before it is done."""
    rows = "\n".join(json.dumps({"prompt": "p", "rejected": f"{n} " + "a@" * 50}) for n in range(5_000)).encode()

    async def race(app: Any) -> int:
        query = b"uid=upload-01&name=log.jsonl"
        reading = asyncio.create_task(send(app, "POST", "/api/imports", query=query, headers=BINARY, body=rows))
        answered = 0
        with contextlib.suppress(TimeoutError):
            while not reading.done():
                assert (await send(app, "GET", "/api/state", headers=JSON)).status == 200
                answered += 1
        assert (await reading).status == 200
        return answered

    with void_in_process(tmp_path) as (app, _):
        assert asyncio.run(race(app)) > 5
