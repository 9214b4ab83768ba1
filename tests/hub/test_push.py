"""`buleyean push`, as a user runs it, against a stand-in of the Hub's API on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import make_record, write_records
from buleyean_rl.errors import UsageError
from buleyean_rl.gguf import export_gguf
from buleyean_rl.hub.push import plan_upload
from sample_report import REPORT
from tiny import tiny_llama, tiny_run, tiny_tokenizer

TOKEN = "hf_standin"


class StandIn(ThreadingHTTPServer):
    """The parts of the Hub's API that an upload goes through, and what was sent to them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.refuses = False


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, value: object, code: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        name = self.path.partition("/resolve/main/")[2]
        if name in self.server.files:
            self.reply({}, ETag='"1"', X_Repo_Commit="1" * 40)
        else:
            self.reply({}, 404, X_Error_Code="EntryNotFound")

    def do_GET(self) -> None:
        self.do_HEAD()

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[-1]] = self.body()
        self.reply({}, ETag='"1"')

    def do_POST(self) -> None:
        server, body = self.server, self.body()
        if server.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "You are not allowed to do that."}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            server.repositories[asked["name"]] = asked
            place = "datasets/" if asked.get("type") == "dataset" else ""
            self.reply({"url": f"{server.url}/{place}{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            asked = json.loads(body)
            assert asked["content"].startswith("---\n")
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.reply({"files": files, "commitOid": "1" * 40})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{server.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    server.commits.append(value["summary"])
                elif line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
            place = self.path.partition("/commit/")[0].removeprefix("/api/").removeprefix("models/")
            self.reply({"commitUrl": f"{server.url}/{place}/commit/1", "commitOid": "2" * 40, "success": True})
        else:
            self.reply({"error": f"no {self.path} here"}, 404)


@pytest.fixture
def standin() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(server: StandIn, *words: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose Hub is the stand-in."""
    own = {"HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = "import sys; from buleyean_rl.cli import main; sys.exit(main())"
    environment = {**os.environ, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, "push", *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def is_private(asked: dict[str, Any]) -> bool:
    """What was asked for when a repository was made, in the words of newer clients and of older ones."""
    return asked["visibility"] == "private" if "visibility" in asked else asked["private"]


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    folder = tiny_run(tmp_path / "run", base)
    (folder / "run.json").write_text(json.dumps({"format": 2} | asdict(REPORT) | {"model": str(base)}))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/optimizer.pt").write_bytes(b"private")
    (folder / "notes.txt").write_text("private")
    return folder


def test_a_run(standin: StandIn, run: Path) -> None:
    done = push(standin, run, "--to", "me/model", "--yes", "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{standin.url}/me/model"
    uploaded, following = done.stderr.splitlines()[-2:]
    assert uploaded.startswith("uploaded: ")
    assert " export " in following
    assert is_private(standin.repositories["model"])
    assert "type" not in standin.repositories["model"] or standin.repositories["model"]["type"] == "model"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= standin.files.keys()
    assert not {name for name in standin.files if "checkpoint" in name or "notes" in name}
    assert standin.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert b"license: mit" in standin.files["README.md"]
    assert len(standin.commits) == 1
    for name, content in standin.files.items():  # no path of this machine leaves it
        assert str(run.parent.parent).encode() not in content, name
    assert json.loads(standin.files["adapter_config.json"])["base_model_name_or_path"] == "base"


@pytest.mark.slow
def test_gguf_files_and_the_run_they_came_from(standin: StandIn, run: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", gate=False).path
    done = push(standin, path, "--to", "me/model-GGUF", "--run", run, "--public", "--yes", "--message", "as trained")
    assert done.returncode == 0, done.stderr
    assert not is_private(standin.repositories["model-GGUF"])
    assert hashlib.sha256(standin.files["m.gguf"]).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert b"| `m.gguf` | Q8_0 |" in standin.files["README.md"]
    assert b"| Optimality gap |" in standin.files["README.md"]
    assert standin.commits == ["as trained"]


@pytest.mark.slow
def test_a_card_that_is_there_stays_unless_it_may_go(standin: StandIn, run: Path) -> None:
    standin.files["README.md"] = b"written by hand"
    assert push(standin, run, "--to", "me/model", "--yes").returncode == 0
    assert standin.files["README.md"] == b"written by hand"
    assert push(standin, run, "--to", "me/model", "--yes", "--overwrite").returncode == 0
    assert standin.files["README.md"].startswith(b"---")


def test_records(standin: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "noes.jsonl"
    write_records(path, [make_record("Hi", ["No"], [1], 1)])
    done = push(standin, path, "--to", "me/noes", "--yes")
    assert done.returncode == 0, done.stderr
    assert standin.repositories["noes"]["type"] == "dataset"
    assert standin.files["noes.jsonl"] == path.read_bytes()
    assert b"| Records | 1 |" in standin.files["README.md"]


@pytest.mark.slow
def test_nothing_goes_without_being_asked_for(standin: StandIn, run: Path) -> None:
    done = push(standin, run, "--to", "me/model")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: stdin is not a terminal to confirm on: add --yes to upload"
    assert "adapter_model.safetensors" in done.stderr
    assert not standin.repositories
    assert push(standin, run).returncode == 2


@pytest.mark.slow
def test_what_the_hub_says_when_it_refuses(standin: StandIn, run: Path) -> None:
    standin.refuses = True
    done = push(standin, run, "--to", "me/model", "--yes")
    assert done.returncode == 1
    assert "error: me/model: the Hub refuses: " in done.stderr
    assert "Traceback" not in done.stderr
    server = StandIn()
    server.server_close()
    done = push(server, run, "--to", "me/model", "--yes")
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr


def test_what_cannot_be_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.gguf", "b.jsonl", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    for names, problem in (
        (["a.gguf", "b.jsonl"], "not a mixture"),
        (["c.txt"], "not a mixture"),
        (["absent"], "no such file"),
        (["folder"], "no run.json"),
    ):
        with pytest.raises(UsageError, match=problem):
            plan_upload([tmp_path / name for name in names], "me/x")
    with pytest.raises(UsageError, match="--to x: name the repository as OWNER/NAME"):
        plan_upload([tmp_path / "a.gguf"], "x")
    assert main(["push", str(tmp_path / "absent"), "--to", "me/x", "--yes"]) == 2
    assert "Traceback" not in capsys.readouterr().err
