"""Connect: what services answer, page by page, becomes rows and records; a stand-in checks every request."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import read_records
from buleyean_rl.errors import EngineError, NothingRejected, UsageError
from buleyean_rl.live.connect import api
from buleyean_rl.live.connect.sync import ImportSettings, Visit, sync

Row = dict[str, Any]
Answer = tuple[int, Any]
KEY = "sk-very-secret"
BREAKS_OFF = 0  # a reply that ends in its middle


@contextmanager
def service(answer: Callable[[str, str, dict[str, list[str]], Row], Answer]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers (method, path, query, body or headers) with a status and JSON; its URL, and its log."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply("GET", {"headers": dict(self.headers.items())})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply("POST", {"headers": dict(self.headers.items()), "body": body})

        def reply(self, method: str, sent: Row) -> None:
            parts = urlsplit(self.path)
            log.append(f"{method} {self.path}")
            status, value = answer(method, parts.path, parse_qs(parts.query), sent)
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(200 if status == BREAKS_OFF else status)
            if isinstance(value, bytes) and value.startswith(b"<"):
                self.send_header("Content-Type", "text/html; charset=utf-8")
            if 300 <= status < 400:
                self.send_header("Location", "https://chat.example/")
            self.send_header("Content-Length", str(len(raw) + 9 * (status == BREAKS_OFF)))
            self.end_headers()
            self.wfile.write(raw)
            self.close_connection = status == BREAKS_OFF

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENWEBUI_API_KEY", "LANGFUSE_SECRET_KEY", "LANGSMITH_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", "pk-public")
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)


def feedback(number: int, rating: int, at: int, answer: str = "No.") -> Row:
    """A row of Open WebUI's feedback export."""
    asked = {"id": "a", "parentId": None, "role": "user", "content": f"Question {number}?"}
    said = {"id": "b", "parentId": "a", "role": "assistant", "content": answer}
    chat = {"chat": {"chat": {"history": {"messages": {"a": asked, "b": said}, "currentId": "b"}}}}
    return {
        "id": f"feedback-{number}",
        "user_id": "user-1",
        "updated_at": at,
        "created_at": at,
        "type": "rating",
        "data": {"rating": rating, "reason": "not_factually_correct"},
        "meta": {"message_id": "b"},
        "snapshot": chat,
    }


class OpenWebUI:
    """Open WebUI's interface as 0.12 has it; `version` 0 has neither pages nor an export of feedback."""

    def __init__(self, rows: list[Row], version: int = 1) -> None:
        self.rows, self.version = rows, version
        self.fault: tuple[str, Answer] | None = None  # of the first request to a path that ends so

    def __call__(self, method: str, path: str, query: dict[str, list[str]], sent: Row) -> Answer:
        assert method == "GET"
        if sent["headers"].get("Authorization") != f"Bearer {KEY}":
            return 401, {"detail": f"{sent['headers'].get('Authorization')} is not a key"}
        if self.fault is not None and path.endswith(self.fault[0]):
            (_, fault), self.fault = self.fault, None
            return fault
        match path.removeprefix("/api/v1/"):
            case "evaluations/feedbacks/list" if self.version:
                assert query == {"order_by": ["updated_at"], "direction": ["desc"], "page": ["1"]}
                newest = sorted(self.rows, key=lambda row: -row["updated_at"])[:30]
                items = [{name: value for name, value in row.items() if name != "snapshot"} for row in newest]
                return 200, {"items": items, "total": len(self.rows)}
            case "evaluations/feedbacks/all/export" if self.version:
                return 200, self.rows
            case "chats/all/db" if not self.version:
                return 200, [
                    {"id": "chat", "chat": self.rated(row), "user_id": "user-1", "updated_at": 1} for row in self.rows
                ]
        return 200, b"<!doctype html>"  # its page, for every path that it does not have

    def rated(self, row: Row) -> Row:
        chat: Row = json.loads(json.dumps(row["snapshot"]["chat"]["chat"]))
        chat["history"]["messages"]["b"]["annotation"] = {"rating": row["data"]["rating"]}
        return chat


def visit(name: str, folder: Path, **settings: Any) -> Visit:
    return sync(name, folder, ImportSettings(**settings))


def prompts(folder: Path) -> list[Any]:
    return [record.prompt for record in read_records(folder / "records.jsonl") if record.rejects]


def test_open_webui_is_asked_for_all_of_it_only_where_something_is_new(tmp_path: Path) -> None:
    webui = OpenWebUI([feedback(1, -1, 10), feedback(2, 1, 11)])
    with service(webui) as (url, log):
        source, folder = f"openwebui:{url}", tmp_path / "webui"
        assert visit(source, folder).is_new
        assert prompts(folder) == ["Question 1?"]
        assert not visit(source, folder).is_new
        assert len([line for line in log if "export" in line]) == 1
        webui.rows += [feedback(number, -1, 12) for number in range(3, 103)]
        webui.rows[1] = feedback(2, -1, 13)  # a thumb that was turned
        del webui.rows[0]  # one that was taken back
        assert visit(source, folder).is_new
        assert prompts(folder)[:2] == ["Question 2?", "Question 3?"]
        assert len(prompts(folder)) == 101
        webui.rows = [feedback(2, 1, 14)]
        nothing = visit(source, folder)
        assert (nothing.records, "no rejected answer" in nothing.remark) == (None, True)
        assert not (folder / "records.jsonl").exists()
    text = "".join(path.read_text() for path in folder.iterdir())
    assert KEY not in text


def test_an_old_open_webui_gives_its_chats(tmp_path: Path) -> None:
    with service(OpenWebUI([feedback(1, -1, 10)], version=0)) as (url, _):
        assert visit(f"openwebui:{url}", tmp_path / "webui").is_new
        assert prompts(tmp_path / "webui") == ["Question 1?"]


@pytest.mark.parametrize("path", ["/list", "/export"])
@pytest.mark.parametrize("fault", [(503, {}), (429, {}), (BREAKS_OFF, b"[{")], ids=["down", "busy", "breaks off"])
def test_a_service_that_fails_once_is_asked_again(path: str, fault: Answer, tmp_path: Path) -> None:
    webui = OpenWebUI([feedback(1, -1, 10)])
    with service(webui) as (url, _):
        webui.fault = path, fault
        visit(f"openwebui:{url}", tmp_path / "webui")
        assert prompts(tmp_path / "webui") == ["Question 1?"]


def test_what_is_wrong_with_a_service_is_said_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webui, folder = OpenWebUI([feedback(1, -1, 10)]), tmp_path / "webui"
    with service(webui) as (url, _):
        visit(f"openwebui:{url}", folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        webui.rows.append(feedback(2, -1, 11))
        for fault, error in (
            ((200, {"feedbacks": []}), EngineError),  # another schema
            ((200, b"[{"), EngineError),
            ((301, b""), EngineError),
            ((400, {"detail": "no"}), EngineError),
        ):
            webui.fault = "/list", fault
            with pytest.raises(error, match="feedbacks/list"):
                visit(f"openwebui:{url}", folder)
        monkeypatch.setenv("OPENWEBUI_API_KEY", KEY + "x")
        with pytest.raises(UsageError, match="the key in OPENWEBUI_API_KEY is not accepted") as refused:
            visit(f"openwebui:{url}", folder)
        assert KEY not in str(refused.value)
        monkeypatch.delenv("OPENWEBUI_API_KEY")
        with pytest.raises(UsageError, match="set OPENWEBUI_API_KEY"):
            visit(f"openwebui:{url}", folder)
        with pytest.raises(UsageError, match="is of openwebui:"):
            visit(str(tmp_path / "log"), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Langfuse:
    """Langfuse's public interface: scores by page, from a time on; traces by id."""

    def __init__(self) -> None:
        self.scores = [self.score(number) for number in range(110)]

    def score(self, number: int, value: float = 0) -> Row:
        time = f"2026-01-{1 + number // 100:02}T00:00:{number % 60:02}.000Z"
        return {"id": f"s{number}", "traceId": f"t{number}", "name": "thumb", "value": value, "timestamp": time}

    def __call__(self, method: str, path: str, query: dict[str, list[str]], sent: Row) -> Answer:
        assert method == "GET"
        scheme, _, basic = sent["headers"]["Authorization"].partition(" ")
        assert (scheme, base64.b64decode(basic)) == ("Basic", f"pk-public:{KEY}".encode())
        if path == "/api/public/v2/scores":
            assert query.keys() <= {"page", "limit", "fromTimestamp"}
            since, page, limit = query.get("fromTimestamp", [""])[0], int(query["page"][0]), int(query["limit"][0])
            scores = [score for score in self.scores if score["timestamp"] >= since]
            meta = {"page": page, "limit": limit, "totalItems": len(scores), "totalPages": -(-len(scores) // limit)}
            return 200, {"data": scores[(page - 1) * limit :][:limit], "meta": meta}
        identity = path.removeprefix("/api/public/traces/")
        scores = [score for score in self.scores if score["traceId"] == identity]
        if identity == "t7":
            return 404, {"error": "LangfuseNotFoundError", "message": "Trace not found"}
        row = {"id": identity, "timestamp": scores[0]["timestamp"], "input": f"Question {identity}?", "output": "No."}
        return 200, row | {"scores": scores}


def test_langfuse_is_asked_for_traces_that_were_scored_since(tmp_path: Path) -> None:
    langfuse, folder = Langfuse(), tmp_path / "langfuse"
    with service(langfuse) as (url, log):
        visit(f"langfuse:{url}", folder)
        assert len(prompts(folder)) == 109  # one trace was deleted
        begin = len(log)
        assert not visit(f"langfuse:{url}", folder).is_new
        assert all("fromTimestamp" in line for line in log[begin:])
        langfuse.scores.append(langfuse.score(3) | {"id": "later", "timestamp": "2026-02-01T00:00:00.000Z"})
        begin = len(log)
        assert visit(f"langfuse:{url}", folder).is_new
        assert [line for line in log[begin:] if "traces" in line] == ["GET /api/public/traces/t3"]
        assert len(prompts(folder)) == 109
        judged = [record for record in read_records(folder / "records.jsonl") if record.prompt == "Question t3?"]
        assert judged[0].rejection_counts == (2,)
        late = {"id": "late", "timestamp": "2026-01-31T23:30:00.000Z"}  # listed after a later one
        langfuse.scores.append(langfuse.score(4) | late)
        assert visit(f"langfuse:{url}", folder).is_new
        assert not visit(f"langfuse:{url}", folder).is_new
        (folder / "rows.jsonl").unlink()
        assert visit(f"langfuse:{url}", folder).is_new
        assert len(prompts(folder)) == 109


def langsmith(method: str, path: str, query: dict[str, list[str]], sent: Row) -> Answer:
    """LangSmith's interface: feedback by project and time or by run, and runs by their ids."""
    assert sent["headers"]["X-Api-Key"] == KEY
    items = [
        {
            "id": f"f{number}",
            "run_id": f"r{number}",
            "key": "user",
            "score": number % 2,
            "created_at": f"2026-01-01T00:{number:02}",
        }
        for number in range(5)
    ]
    match method, path:
        case "GET", "/api/v1/sessions":
            return 200, [{"id": "project-1"}] if query == {"name": ["bot"]} else []
        case "GET", "/api/v1/feedback":
            if "run" in query:
                items = [item for item in items if item["run_id"] in query["run"]]
            else:
                assert (query["session"], query["has_score"]) == (["project-1"], ["true"])
                items = [item for item in items if item["created_at"] >= query.get("min_created_at", [""])[0]]
            return 200, items[int(query["offset"][0]) :][: int(query["limit"][0])]
        case "POST", "/api/v1/runs/query":
            assert sent["body"].keys() == {"id", "limit"}
            return 200, {
                "runs": [
                    {
                        "id": run,
                        "run_type": "llm",
                        "inputs": {"messages": [[{"role": "user", "content": f"Question {run}?"}]]},
                        "outputs": {"output": "No."},
                        "feedback_stats": {"user": {"n": 1, "avg": 0}},
                    }
                    for run in sent["body"]["id"]
                ]
            }
    return 404, {"detail": "Not Found"}


def test_langsmith_is_asked_for_runs_that_got_feedback(tmp_path: Path) -> None:
    with service(langsmith) as (url, _):
        assert visit(f"langsmith:{url}#bot", tmp_path / "a").is_new
        assert prompts(tmp_path / "a") == ["Question r0?", "Question r2?", "Question r4?"]
        assert not visit(f"langsmith:{url}#bot", tmp_path / "a").is_new
        with pytest.raises(UsageError, match="no project 'other'"):
            visit(f"langsmith:{url}#other", tmp_path / "b")


def test_a_log_that_grows_is_read_again(tmp_path: Path) -> None:
    log, folder = tmp_path / "log.jsonl", tmp_path / "folder"
    line = '{{"prompt": "Question {}?", "completion": "No.", "label": false}}\n'
    log.write_text(line.format(1))
    assert visit(str(log), folder).is_new
    assert not visit(str(log), folder).is_new
    log.write_text(line.format(1) + line.format(2) + '{"prompt": "half of a li')
    assert visit(str(log), folder).is_new
    assert prompts(folder) == ["Question 1?", "Question 2?"]


@pytest.mark.parametrize("path", ["/sessions", "/feedback", "/query"])
def test_a_path_that_a_service_lacks_is_named(path: str, tmp_path: Path) -> None:
    def lacking(method: str, asked: str, query: dict[str, list[str]], sent: Row) -> Answer:
        return (404, {}) if asked.endswith(path) else langsmith(method, asked, query, sent)

    with service(lacking) as (url, _), pytest.raises(EngineError, match=f"{path}: it has no"):
        visit(f"langsmith:{url}#bot", tmp_path / "a")


def test_pages_that_repeat_end(tmp_path: Path) -> None:
    def repeating(method: str, path: str, query: dict[str, list[str]], sent: Row) -> Answer:
        if path.endswith("/feedback"):
            return 200, [{"id": str(number), "created_at": "2026-01-01", "run_id": "r"} for number in range(100)]
        return langsmith(method, path, query, sent)

    with service(repeating) as (url, _), pytest.raises(EngineError, match="all the same"):
        visit(f"langsmith:{url}#bot", tmp_path / "a")


def test_a_login_page_is_no_deleted_trace(tmp_path: Path) -> None:
    langfuse = Langfuse()

    def logged_out(method: str, path: str, query: dict[str, list[str]], sent: Row) -> Answer:
        return (200, b"<html>") if path.endswith("/t3") else langfuse(method, path, query, sent)

    with service(logged_out) as (url, _), pytest.raises(EngineError, match="t3: its reply is a page"):
        visit(f"langfuse:{url}", tmp_path / "langfuse")


def test_rows_are_read_again_where_they_are_to_be_read_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "webui"
    with service(OpenWebUI([feedback(1, -1, 10, "Write to a.b@example.org.")])) as (url, _):
        visit(f"openwebui:{url}", folder)
        assert "a.b@" in (folder / "records.jsonl").read_text()
        assert visit(f"openwebui:{url}", folder, redact=True).is_new
        assert "a.b@" not in (folder / "records.jsonl").read_text()
        assert not visit(f"openwebui:{url}", folder, redact=True).is_new


def test_rows_of_another_schema_leave_the_records_that_are_there(tmp_path: Path) -> None:
    log, folder = tmp_path / "log.jsonl", tmp_path / "folder"
    log.touch()
    assert visit(str(log), folder).remark.endswith("has no rated answer yet")
    log.write_text('{"prompt": "Why?", "completion": "No.", "label": false}\n')
    assert visit(str(log), folder).is_new
    log.write_text('{"prompt": 7, "completion": "No.", "label": false}\n')
    for _ in range(2):
        with pytest.raises(NothingRejected, match="bad rows skipped: 1"):
            visit(str(log), folder)
    assert prompts(folder) == ["Why?"]


def test_the_rows_of_a_log_lie_outside_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name a folder outside"):
        visit(str(tmp_path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_data_import_takes_a_service_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with service(OpenWebUI([feedback(1, -1, 10)])) as (url, _):
        assert main(["data", "import", f"openwebui:{url}", "-o", str(tmp_path / "r.jsonl")]) == 0
        assert "1 rejection of 1 answer" in capsys.readouterr().err
        assert main(["connect", f"openwebui:{url}", "-o", str(tmp_path / "webui")]) == 0
        assert (tmp_path / "webui/records.jsonl").read_bytes() == (tmp_path / "r.jsonl").read_bytes()
    assert main(["data", "import", "gopher://x", "-o", str(tmp_path / "r.jsonl")]) == 2
    assert "openwebui:URL" in capsys.readouterr().err
