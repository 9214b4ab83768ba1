"""Models of the Void in use: compared, downloaded, and answering elsewhere as they did there."""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from buleyean_rl.inference.gguf_engines import ENGINES, open_gguf
from buleyean_rl.inference.llama_cpp_python import is_installed
from buleyean_rl.models.source import BUNDLED
from bundled import needs_bundled
from voids import Process, running, until

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "Give me a tip.", 24
# In nats: by less a token's log-probability changes between the page's bf16, which rounds weights and activations to
# 8 bits, and the file's 11. A rival as near may come first.
NEAR_TIE = 0.2


def trained(void: Process) -> int:
    """A run that has ended with a model."""
    void.reject("rejection-1", void.ask("train-001", PROMPT, max_tokens=TOKENS)["answers"][0]).raise_for_status()
    run = int(void.post("runs", uid="run-00001", steps=4).json()["id"])
    assert void.finished(run)["state"] == "done"
    return run


def download(void: Process, run: int, kind: str, folder: Path) -> Path:
    """A file of a model, made and fetched as a browser does."""
    void.post(f"runs/{run}/files/{kind}").raise_for_status()

    def made() -> Any:
        file = next(each for each in void.get(f"runs/{run}/files")["files"] if each["kind"] == kind)
        assert file["state"] != "failed", file["error"]
        return file["state"] == "ready" and file

    name = until(made, 180)["name"]
    url = void.post(f"runs/{run}/files/{kind}/link").json()["url"]
    (folder / name).write_bytes(void.client.get(url).raise_for_status().content)
    return folder / name


@needs_bundled
def test_a_downloaded_file_answers_as_the_page_did(tmp_path: Path) -> None:
    """Each token of the page is the likeliest in the file, or a near tie."""
    with running(BUNDLED, tmp_path / "void") as void:
        run = trained(void)
        file = download(void, run, "f16", tmp_path)
        modelfile = download(void, run, "modelfile", tmp_path)
        answered = void.ask("after-001", PROMPT, max_tokens=TOKENS, models=[f"run-{run}"])["answers"]
    assert f"FROM ./{file.name}\n" in modelfile.read_text()
    for engine in ENGINES:
        if engine != "llama-cpp-python" or is_installed():
            with closing(open_gguf(file, engine)) as opened:
                ids = opened.prompt_ids([{"role": "user", "content": PROMPT}])
                for token in opened.tokenize(answered[0]["text"], parse_special=False):
                    likeliest = opened.top_logprobs(ids, 100)
                    assert likeliest[token] > max(likeliest.values()) - NEAR_TIE
                    ids.append(token)


def test_two_models_answer_the_same_prompts(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        run = trained(void)
        models = [f"run-{run}", "base"]
        batch = void.post("batches", uid="batch-001", prompts=[PROMPT, "Say hello."], models=models, max_tokens=16)
        assert [each["model"] for each in batch.json()["models"]] == models
        until(lambda: void.get("batches/batch-001")["state"] == "done", 60)
        for card in void.get("batches/batch-001/cards?count=9")["cards"]:
            assert [answer["model"] for answer in card["answers"]] == models
            assert all(answer["text"] for answer in card["answers"])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_ends_during_an_import_says_nothing(base: Path, tmp_path: Path, how: signal.Signals) -> None:
    rows = b"\n".join(b'{"prompt": "p", "rejected": "%d %s"}' % (n, b"a@" * 50) for n in range(30_000))
    problems: list[str] = []

    def send(void: Process) -> None:
        with httpx2.Client(base_url=void.url, timeout=60, trust_env=False) as client:
            headers = {"Content-Type": "application/octet-stream"}
            reply = client.post("/api/imports?uid=upload-01&name=log.jsonl", content=rows, headers=headers)
            problems.append(reply.json().get("error", "it was read"))

    with running(base, tmp_path) as void, void.client.stream("GET", "/api/events") as stream:
        sender = threading.Thread(target=send, args=(void,))
        sender.start()
        until(lambda: list(tmp_path.glob(".import*")), 30)
        assert stream.status_code == 200
        void.process.send_signal(how)
        said = void.process.communicate(timeout=30)[1].decode()
        sender.join()
    assert "Traceback" not in said
    assert "rror" not in said
    assert problems == ["is not imported: the server ends; import it again"]
