"""Files of a model: made once, in a process of their own, and fetched by links that last a while."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asgi import Reply, call
from buleyean_rl.void import files as module
from voids import until, void_in_process

# Instead of the export: writes what it is told, unless it is told to fail by the name.
STANDIN = """
import sys, time
from pathlib import Path
target, name = Path(sys.argv[3]), sys.argv[-1]
if name == "fails":
    sys.exit("error: the disk is full")
target.with_name(".model.gguf.tmp").write_bytes(b"x" * 500)
time.sleep(0.4)
target.with_name(".model.gguf.tmp").rename(target)
time.sleep(0.2)
target.with_name("Modelfile").write_text("FROM ./model.gguf\\nTEMPLATE x\\n")
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(module, "EXPORT", [sys.executable, "-c", STANDIN])
    with void_in_process(tmp_path) as (app, void):
        run = void.store.runs.add("run-00001", "runs/run-1", 1, 1, 12)
        folder = tmp_path / "runs" / f"run-{run}"
        folder.mkdir(parents=True)
        report = {"rejected_nll_base": 0.5, "rejected_nll_final": 2.5, "drift": {}, "guard": None}
        (folder / "run.json").write_text(json.dumps(report))
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n<script>x</script>")
        folder.with_suffix(".jsonl").write_text("{}\n")
        void.store.runs.end(run, "done")
        yield app


def shown(app: Any, kind: str = "q8_0") -> Any:
    listed = call(app, "GET", "/api/runs/1/files").json()["files"]
    return next(file for file in listed if file["kind"] == kind)


def make(app: Any, kind: str = "q8_0") -> Any:
    assert call(app, "POST", f"/api/runs/1/files/{kind}", {}).status == 200
    return until(lambda: (file := shown(app, kind))["state"] != "making" and file, 30)


def fetch(app: Any, kind: str) -> Reply:
    return call(app, "GET", call(app, "POST", f"/api/runs/1/files/{kind}/link", {}).json()["url"])


def test_a_file_is_made_once_and_downloaded(app: Any) -> None:
    call(app, "POST", "/api/runs/1/name", {"name": "Sleep tips, ä"})
    assert (shown(app)["state"], shown(app)["name"]) == ("missing", "sleep-tips-Q8_0.gguf")
    assert call(app, "POST", "/api/runs/1/files/q8_0/link", {}).status == 400  # it is not there yet
    assert call(app, "POST", "/api/runs/1/files/q8_0", {}).json()["state"] == "making"
    assert call(app, "POST", "/api/runs/1/files/q4_0", {}).status == 400  # one at a time
    until(lambda: shown(app)["progress"], 30)
    made = until(lambda: (file := shown(app))["state"] == "ready" and file, 30)
    assert (made["bytes"], made["progress"]) == (500, None)
    assert make(app, "q4_0")["state"] == "ready"  # at once
    assert call(app, "POST", "/api/runs/1/files/q8_0", {}).json()["state"] == "ready"
    reply = fetch(app, "q8_0")
    assert (reply.status, len(reply.body)) == (200, 500)
    assert reply.headers["content-disposition"] == 'attachment; filename="sleep-tips-Q8_0.gguf"'
    assert fetch(app, "modelfile").body == b"FROM ./sleep-tips-Q8_0.gguf\nTEMPLATE x\n"
    assert call(app, "GET", "/api/runs/1/files").json()["ollama"] == "ollama create sleep-tips -f Modelfile"


def test_adapter_records_and_card_are_there_at_once(app: Any) -> None:
    names = zipfile.ZipFile(io.BytesIO(fetch(app, "adapter").body)).namelist()
    assert names == ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    assert fetch(app, "records").body == b"{}\n"
    assert fetch(app, "card").body.startswith(b"---")
    assert "&lt;script" in call(app, "GET", "/api/runs/1").json()["card_html"]
    assert not shown(app, "modelfile")["possible"]  # it comes with a GGUF


def test_what_fails_says_why_and_can_be_tried_again(app: Any) -> None:
    call(app, "POST", "/api/runs/1/name", {"name": "fails"})
    failed = make(app)
    assert (failed["state"], failed["error"]) == ("failed", "the disk is full")
    call(app, "POST", "/api/runs/1/name", {"name": "works"})
    assert make(app)["state"] == "ready"


def test_k_quants_need_llama_cpp_python(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_installed", lambda: False)
    assert (shown(app, "q4_k_m")["possible"], "llama-cpp-python" in shown(app, "q4_k_m")["problem"]) == (False, True)
    assert call(app, "POST", "/api/runs/1/files/q4_k_m", {}).status == 400
    monkeypatch.setattr(module, "is_installed", lambda: True)
    assert shown(app, "q4_k_m")["possible"]


def test_a_link_lasts_a_while_and_leads_nowhere_else(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = call(app, "POST", "/api/runs/1/files/card/link", {}).json()["url"]
    assert call(app, "GET", url.replace("README.md", "passwd")).status == 200  # the name is for the browser
    for path in ("/download/guess/README.md", "/download/../../etc/passwd", "/download/x/%2e%2e"):
        assert call(app, "GET", path).status == 404
    monkeypatch.setattr(module, "LINK_SECONDS", -1.0)
    assert fetch(app, "card").status == 404


@pytest.mark.parametrize("name", ["../../etc", "a/b\\c", "<b>", "…", "-" * 80, "con\u202e"])
def test_a_models_name_becomes_a_file_name_of_plain_letters(app: Any, name: str) -> None:
    status = call(app, "POST", "/api/runs/1/name", {"name": name}).status
    assert status == (200 if name.isprintable() else 400)
    assert set(shown(app)["name"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_Q.gu")


def test_a_model_is_deleted_with_its_files(app: Any, tmp_path: Path) -> None:
    make(app)
    assert call(app, "POST", "/api/runs/1/delete", {}).status == 200
    assert not list((tmp_path / "runs").iterdir())
    assert not list((tmp_path / "files").iterdir())
    assert call(app, "GET", "/api/models").json()["runs"] == []
    assert call(app, "GET", "/api/runs/1/files").status == 404
