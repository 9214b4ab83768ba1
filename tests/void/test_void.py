"""The page's interface: what it does, whom it refuses, and what a restart leaves."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import read_records
from buleyean_rl.web import listener as listening
from voids import Process, events, running, until

UID = "uid-0000"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def void(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(base, tmp_path_factory.mktemp("void")) as process:
        yield process


def test_the_page_is_served_with_a_policy_that_runs_no_stray_script(void: Process) -> None:
    page = void.client.get("/")
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert void.client.get("/app.js").headers["content-type"].startswith("text/javascript")
    assert void.client.get("/../serve.py").status_code == 404


def begin(void: Process, uid: str, prompt: str) -> None:
    void.post("turns", uid=uid, conversation=uid, prompt=prompt, max_tokens=128).raise_for_status()


def test_an_answer_streams_and_comes_again_from_the_start(void: Process) -> None:
    begin(void, "stream-01", "Give me a tip.")
    texts = []
    for _ in range(2):
        text = ""
        with void.client.stream("GET", "/api/turns/stream-01/stream") as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            for event in events(reply):
                assert event["text"].startswith(text)
                text = event["text"]
        assert event["state"] in ("done", "cut")
        texts.append(text)
    assert texts[0] == texts[1] == void.get("turns/stream-01")["answers"][0]["text"] != ""


def test_two_readers_hear_the_same(void: Process) -> None:
    begin(void, "stream-02", "Tell me more, much more.")
    with (
        void.client.stream("GET", "/api/turns/stream-02/stream") as one,
        httpx2.Client(base_url=void.url, trust_env=False) as client,
        client.stream("GET", "/api/turns/stream-02/stream") as other,
    ):
        assert list(events(one))[-1] == list(events(other))[-1]


def test_a_rejection_is_stored_once_exported_and_undone(void: Process) -> None:
    answer = void.ask("reject-01", "Say something.")["answers"][0]
    assert void.reject("rejection-1", answer).json()["id"]
    first = void.reject("rejection-2", answer, spans=[[0, 2]], reason=SCRIPT).json()
    assert void.reject("rejection-2", answer).json()["id"] == first["id"]
    rows = [row for row in void.get("rejections")["rows"] if row["prompt"] == "Say something."]
    assert [(row["spans"], row["reason"]) for row in rows] == [([[0, 2]], SCRIPT), ([], "")]
    assert "<del" in first["answer"]["html"]
    exported = [json.loads(line) for line in void.client.get("/api/export").text.splitlines()]
    (record,) = [record for record in exported if record["prompt"] == "Say something."]
    assert record["rejected_responses"] == [answer["text"], answer["text"]]
    assert record["rejected_spans"] == [[], [[0, 2]]]
    shown = void.post(f"rejections/{first['id']}/undo", answer=answer["id"]).json()["answer"]
    assert ("<del" in shown["html"], len(shown["rejections"])) == (False, 1)
    void.post(f"rejections/{first['id']}/redo")
    void.post(f"rejections/{first['id']}/reason", reason="plain").raise_for_status()
    assert void.get("rejections?q=plain")["rows"][0]["reason"] == "plain"
    assert void.post("rejections/undo", ids=[first["id"]]).json() == {"changed": 1}
    assert void.get("rejections?q=plain")["total"] == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", '{"prompt": "up 1", "rejected_responses": ["a", "b"], "rejection_counts": [2, 1]}\n'),
        ("r.json", '[{"prompt": "up 2", "chosen": "x", "rejected": "b"}]'),
        ("../../etc/r", '{"prompt": "up 3", "completion": "c", "label": false}\n'),
    ],
)
def test_a_file_is_imported_once(void: Process, name: str, content: str) -> None:
    before = void.get("state")["rejections"]
    for _ in range(2):
        assert void.upload(f"upload-{len(content)}", content, name=name).status_code == 200
    assert void.get("state")["rejections"] == before + (2 if name == "r.jsonl" else 1)


@pytest.mark.parametrize(
    ("content", "status", "problem"),
    [
        (b'{"prompt": "p", "rejected": "a"}\n{oops\n', 400, "line 2: is not valid JSON"),
        (b"", 400, "is empty"),
        (b"\x00\x01\x02", 400, "binary"),
        (b'{"x": 1}\n', 400, "no known format"),
        (b"x" * (16 * 1024 * 1024 + 1), 413, "16,384 KB at most"),
    ],
)
def test_a_bad_upload_is_refused_whole(void: Process, content: bytes, status: int, problem: str) -> None:
    before = void.get("state")["rejections"]
    reply = void.upload("upload-bad", content)
    assert reply.status_code == status
    assert problem in reply.json()["error"]
    assert "/tmp" not in reply.json()["error"]
    assert void.get("state")["rejections"] == before


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("turns", {"uid": UID, "conversation": UID, "prompt": " "}, 400),
        ("turns", {"uid": UID, "conversation": UID, "prompt": "x" * 8001}, 400),
        ("turns", {"uid": UID, "conversation": UID, "prompt": 3}, 400),
        ("turns", {"uid": UID, "conversation": UID, "prompt": "\ud800"}, 400),
        ("turns", {"uid": UID, "conversation": UID, "prompt": "hi", "models": ["run-1"]}, 400),
        ("turns", {"uid": "../x", "conversation": UID, "prompt": "hi"}, 400),
        ("turns", {"uid": UID, "conversation": "../x", "prompt": "hi"}, 400),
        ("rejections", {"uid": UID, "answer": 99999}, 404),
        ("rejections", {"uid": UID, "answer": True}, 400),
        ("rejections", {"uid": UID, "answer": 1, "spans": [[0, 99999]]}, 400),
        ("rejections", {"uid": UID, "answer": 1, "spans": "all"}, 400),
        ("rejections/9999/undo", {}, 404),
        ("rejections/1/eat", {}, 404),
        ("runs", {"uid": UID, "steps": 0}, 400),
        ("runs", {"uid": UID, "steps": 10**9}, 400),
        ("runs/9999/stop", {}, 409),
        ("runs/9999/keep", {}, 404),
        ("runs/9999/files/q8_0", {}, 404),
        ("runs/1/files/passwd", {}, 404),
        ("pair", {"models": ["base", "run-9"]}, 400),
        ("batches", {"uid": UID, "prompts": []}, 400),
        ("imports/nobody-01/take", {}, 404),
        ("nothing", {}, 404),
    ],
)
def test_a_wrong_request_is_said_and_changes_nothing(
    void: Process, path: str, body: dict[str, Any], status: int
) -> None:
    void.ask("checked-1", "hi")
    before = void.get("state")["rejections"]
    content = json.dumps(body).encode()
    reply = void.client.post(f"/api/{path}", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert void.get("state")["rejections"] == before


def test_other_pages_may_do_nothing(void: Process) -> None:
    body = {"content": json.dumps({"uid": UID, "conversation": UID, "prompt": "hi"})}
    kind = {"Content-Type": "application/json"}
    assert void.client.post("/api/turns", **body, headers={"Content-Type": "text/plain"}).status_code == 415
    assert void.client.post("/api/turns", **body, headers=kind | {"Origin": "http://evil.example"}).status_code == 403
    assert void.client.post("/api/turns", **body, headers=kind | {"Origin": void.url}).status_code == 200
    for name in ("evil.example", f"evil.example:{void.port}"):
        assert void.client.get("/", headers={"Host": name}).status_code == 421
        assert void.client.get("/api/state", headers={"Host": name}).status_code == 421
    assert void.client.get("/", headers={"Host": f"localhost:{void.port}"}).status_code == 200


def test_a_body_is_cut_off_where_it_grows_too_large(void: Process) -> None:
    reply = void.client.post("/api/turns", content=b" " * 300_000, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


@pytest.mark.slow
def test_another_address_needs_a_token(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path, "--host", "0.0.0.0", BULEYEAN_VOID_TOKEN="the-token") as void:
        assert void.client.get("/").status_code == 200  # the page itself tells nothing
        for shown in ({}, {"Authorization": "Bearer the-tokem"}, {"Authorization": "the-token"}):
            assert void.client.get("/api/state", headers=shown).status_code == 401
            assert void.client.get("/api/export", headers=shown).status_code == 401
        reply = void.client.get("/api/state", headers={"Authorization": "Bearer the-token", "Host": "my.example"})
        assert reply.status_code == 200
        assert "https://huggingface.co" in reply.headers["content-security-policy"]


def test_a_blind_turn_tells_nobody_until_it_is_revealed(void: Process) -> None:
    asked = void.ask("blind-001", "Who are you?", blind=True)
    assert not asked["revealed"]
    secret = {"model", "name"}
    assert all(secret.isdisjoint(answer) for answer in asked["answers"])
    with void.client.stream("GET", "/api/turns/blind-001/stream") as reply:
        assert all(secret.isdisjoint(event) for event in events(reply))
    (answer,) = asked["answers"]
    assert secret.isdisjoint(void.reject("blind-rej", answer).json()["answer"])
    assert secret.isdisjoint(void.get("conversations/blind-001")["turns"][0]["answers"][0])
    assert void.post("turns/blind-001/reveal").json()["answers"][0]["model"] == "base"
    assert void.get("turns/blind-001")["revealed"]


def test_a_script_in_any_text_is_text(void: Process) -> None:
    turn = void.ask("script-01", SCRIPT, system=SCRIPT)
    assert "<script" not in turn["answers"][0]["html"]
    for path in ("conversations", "conversations/script-01", "turns/script-01"):
        reply = void.client.get(f"/api/{path}")
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.slow
def test_training_puts_the_new_model_to_use(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        assert void.post("runs", uid="run-00001", steps=3).status_code == 409  # nothing is rejected yet
        assert void.get("state")["plan"]["problem"] == "no_rejections"
        first = void.ask("train-001", "Give me a tip.", max_tokens=128)["answers"][0]
        void.reject("rejection-1", first)
        plan = void.get("state")["plan"]
        assert (plan["rejections"], plan["steps"], plan["problem"]) == (1, 12, None)
        assert plan["seconds"] > 0
        run = void.post("runs", uid="run-00001").json()["id"]
        assert void.post("runs", uid="run-00001").json()["id"] == run
        assert void.post("runs", uid="run-00002").status_code == 409
        under_way = void.get("state")["run"]
        assert (under_way["id"], under_way["state"], under_way["steps"]) == (run, "running", 12)
        assert under_way["seconds_left"] > 0
        done = void.finished(run)
        assert (done["state"], done["records"], done["rejections"]) == ("done", 1, 1)
        assert [point["step"] for point in done["points"]] == list(range(1, 13))
        assert done["points"][-1]["loss"] < done["points"][0]["loss"]
        assert all(abs(p["loss"] - p["floor"] - p["gap"]) < 1e-9 for p in done["points"])
        assert "Base model" in done["card_html"]
        (sample,) = done["samples"]
        assert (sample["prompt"], sample["before"]) == ("Give me a tip.", first["text"])
        assert sample["after"] != first["text"]
        verdict = void.get("state")["verdict"]["verdict"]
        assert (verdict["outcome"], verdict["unlearned"], verdict["asked"]) == ("good", 1, 1)
        assert verdict["pairs"][0]["after"] == sample["after"]
        answers = void.ask("train-002", "Give me a tip.", max_tokens=128)["answers"]
        assert [(answer["model"], answer["text"]) for answer in answers] == [
            ("base", first["text"]),
            (f"run-{run}", sample["after"]),
        ]
        assert [len(answer["rejections"]) for answer in answers] == [1, 0]  # the same answer is rejected still
        assert void.post(f"runs/{run}/keep").json()["decision"] == "kept"
        assert void.get("state")["verdict"] is None
        again = void.post("runs", uid="run-00003", steps=10_000).json()["id"]
        until(lambda: void.get(f"runs/{again}")["points"], 60)
        for _ in range(2):  # the second time without what was learnt
            void.post(f"runs/{again}/stop")
        assert void.finished(again)["state"] == "stopped"
        assert void.get("state")["run"] is None
    with running(base, tmp_path) as void:  # a trained model is still there
        assert [each["model"] for each in void.get("state")["pair"]] == ["base", f"run-{run}"]
        assert list(read_records(tmp_path / "runs" / "run-1.jsonl"))
        assert void.post(f"runs/{run}/back").json()["decision"] == "back"
        assert [each["model"] for each in void.get("state")["pair"]] == ["base"]
        assert void.post("pair", models=[f"run-{run}"]).status_code == 200
        assert void.post(f"runs/{run}/delete").status_code == 200
        assert [each["model"] for each in void.get("state")["pair"]] == ["base"]
        assert not (tmp_path / "runs" / "run-1").exists()
        assert void.client.get(f"/api/runs/{run}").status_code == 404
        assert [each["id"] for each in void.get("models")["runs"]] == [again]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_server_that_ends_in_the_middle_of_training_goes_on(base: Path, tmp_path: Path, how: signal.Signals) -> None:
    with running(base, tmp_path) as void:
        void.reject("rejection-1", void.ask("train-001", "Give me a tip.")["answers"][0])
        run = void.post("runs", uid="run-00001", steps=60).json()["id"]
        until(lambda: len(void.get(f"runs/{run}")["points"]) >= 15, 60)
        child = void.process.pid
        void.stop(how)
    until(lambda: not children_of(child), 20)  # nobody trains on for a server that is gone
    with closing(sqlite3.connect(tmp_path / "void.db")) as db, db:
        db.execute("DELETE FROM points WHERE step > 2")  # as if the last words of its run had not been heard
    with running(base, tmp_path) as void:
        assert void.get("state")["run"]["id"] == run
        assert void.get("state")["rejections"] == 1
        done = void.finished(run)
        assert (done["state"], len(void.get("models")["runs"])) == ("done", 1)
        assert [point["step"] for point in done["points"]] == list(range(1, 61))


def children_of(pid: int) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "buleyean_rl.void.training" in line and process.ppid() in (pid, 1):
            found.append(process.pid)
    return found


@pytest.mark.slow
def test_an_answer_that_a_kill_interrupted_goes_on_by_itself(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        void.post("turns", uid="cut-00001", conversation="talk-0001", prompt="A long story, please.", max_tokens=2_000)
        begun = stored_text(tmp_path)
        void.stop(signal.SIGKILL)
    with running(base, tmp_path) as void:
        until(lambda: void.get("turns/cut-00001")["answers"][0]["state"] in ("cut", "done"), 60)
        answer = void.get("turns/cut-00001")["answers"][0]["text"]
        assert answer
        assert answer.startswith(begun)


def stored_text(folder: Path) -> str:
    """What is on disk of an answer that is being written."""
    with closing(sqlite3.connect(folder / "void.db")) as db:
        (row,) = db.execute("SELECT text FROM answers").fetchall()
    return str(row[0])


@pytest.mark.slow
def test_a_run_that_fails_says_why(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        void.upload("upload-01", json.dumps({"prompt": "word " * 3000, "rejected": "a"}).encode())
        done = void.finished(void.post("runs", uid="run-00001", steps=3).json()["id"])
        assert done["state"] == "failed"
        assert "no prompt leaves room for a response" in done["error"]


def test_the_port_is_taken(void: Process, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["void", "--model", str(base), "--port", str(void.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET /api/state HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_half_a_request_is_closed(void: Process, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", void.port), timeout=30) as line:
        line.sendall(begun)
        started = time.monotonic()
        assert line.recv(1) == b""
        assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_whole_request_is_answered_however_long_its_answer_takes(void: Process) -> None:
    with void.client.stream("GET", "/api/events", timeout=30) as reply:
        started = time.monotonic()
        for line in reply.iter_lines():
            if line.startswith(":") and time.monotonic() - started > listening.REQUEST_SECONDS + 2:
                break
