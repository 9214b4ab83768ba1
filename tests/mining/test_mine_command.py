"""The command `mine`: a model, endpoints, many servers, several processes; killed, it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import read_records
from standin import standing_in
from together import run_together

PROMPTS = [f"prompt {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, use_cache: Callable[[Path], None]) -> Path:
    use_cache(tmp_path)
    return tmp_path / "buleyean-rl"


def mine_command(*words: object) -> int:
    return main(["mine", *map(str, words)])


def test_the_command_mines_a_model_and_an_endpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("\n".join(PROMPTS))
    common = ("p.txt", "--judge", "length:99-", "--judge", "loops", "--max-tokens", 8, "--json")
    assert mine_command(*common, "--model", base, "-o", "a.jsonl") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["records"]) == (10, 10)
    sampled = ("--samples", 3, "--seed", 5, "--model", base)
    for output in ("b.jsonl", "c.jsonl"):
        assert mine_command(*common, *sampled, "-o", output) == 0
    assert Path("b.jsonl").read_bytes() == Path("c.jsonl").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["answers"] > 20
    with standing_in() as server:
        server.faults = [429, "half"]
        assert mine_command(*common, "--model", server.url, "-o", "d.jsonl") == 0
    assert "PROMPT 3" in Path("d.jsonl").read_text()
    capsys.readouterr()
    assert mine_command("p.txt", "--judge", "refusal", "--max-tokens", 8, "--model", base, "-o", "a.jsonl") == 1
    assert "nothing was rejected" in capsys.readouterr().err
    assert mine_command("p.txt", "--judge", "huh", "--model", base) == 2
    assert "no judge 'huh'" in capsys.readouterr().err
    assert mine_command("p.txt", "--engine", "llama.cpp", "--model", base) == 2
    assert "buleyean export" in capsys.readouterr().err


def test_many_servers_share_the_prompts_and_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("\n".join(f"prompt {number}" for number in range(40)))
    words = ["mine", "p.txt", "--judge", "regex:PROMPT"]
    with standing_in() as first, standing_in() as second, standing_in() as locked:
        locked.faults = [401] * 40
        Path("servers.txt").write_text(f"# ours\n{first.url}#m parallel=2\n{second.url}#m\n")
        assert main([*words, "--model", "servers.txt", "--model", f"{locked.url}#m", "-o", "a.jsonl", "--json"]) == 0
        assert first.max_concurrent <= 2
        asked = [request["messages"][-1]["content"] for server in (first, second) for request in server.requests]
        assert sorted(asked) == sorted(f"prompt {number}" for number in range(40))
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["answers"], report["rejected"], report["unanswered"]) == (40, 40, {})
    assert [server["model"] for server in report["servers"]] == ["m"] * 3
    assert sum(server["answers"] for server in report["servers"][:2]) == 40
    assert report["servers"][2]["answers"] == 0
    assert f"{locked.url}: 0 answers" in err
    assert "given up: status 401 (its key is read from" in err
    assert {record.policy["model"] for record in read_records("a.jsonl") if record.policy} == {"m"}
    # the model is the same: others go on
    with standing_in() as third:
        words += ["--model", f"{third.url}#m", "--model", f"{third.url.replace('127.0.0.1', 'localhost')}#m"]
        assert main([*words, "-o", "a.jsonl"]) == 0
        assert third.requests == []
    assert main(["mine", "p.txt", "--model", "http://a/v1", "--model", "smollm2-135m"]) == 2
    assert "smollm2-135m is no endpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_loses_at_most_its_batch(base: Path, tmp_path: Path) -> None:
    prompts = "\n".join(f"prompt {number}" for number in range(256))
    (tmp_path / "p.txt").write_text(prompts)
    words = ["mine", "p.txt", "--model", str(base), "--judge", "length:99-", "--max-tokens", "48"]
    command = [sys.executable, "-c", f"from buleyean_rl.cli import main; main({words!r})"]
    journal = tmp_path / "records.mined.jsonl"
    started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_bytes().count(b'"answer"') < 64:
        assert started.poll() is None
        time.sleep(0.02)
    started.kill()
    started.wait()
    written = journal.read_bytes().count(b'"answer"')
    assert 64 <= written < 256
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    message = "of them from its journal"
    assert f"{written} {message}" in done.stderr
    killed = (tmp_path / "records.jsonl").read_bytes()
    for path in (journal, tmp_path / "records.jsonl"):
        path.unlink()
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "records.jsonl").read_bytes() == killed


def test_several_processes_mine_what_one_does(tmp_path: Path) -> None:
    run_together("mine_words", "1,2,3", tmp_path)
    one, two, three = ((tmp_path / f"of-{size}" / "r.jsonl").read_bytes() for size in (1, 2, 3))
    assert one == two == three
    assert one.count(b"\n") > 10


@pytest.mark.slow
def test_torchrun_mines_what_one_process_does(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {number}" for number in range(150)))
    words = [
        "-m",
        "buleyean_rl",
        "mine",
        "p.txt",
        "--model",
        base,
        "--judge",
        "length:-2",
        "--max-tokens",
        16,
        "--json",
    ]
    reports = []
    for size in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            size,
            *words,
            "-o",
            f"{size}.jsonl",
        ]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        assert done.stderr.count("mining ") == 1
    assert reports[0]["rejected"] == reports[1]["rejected"] > 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
