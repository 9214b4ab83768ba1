"""Walking: rounds that build on each other, stop for a reason, and go on where they were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.records import read_records
from buleyean_rl.evaluation.drift import Drift
from buleyean_rl.mining import walk as walking
from buleyean_rl.mining.walk import best_round, reason_not_to_train, reason_to_stop
from buleyean_rl.mining.walk_report import Round, plot_walk
from buleyean_rl.system.outputs import claim_folder
from hostile.attack import untouched
from loads import counting_loads
from quick import make_runs_quick

STILL = Drift(0.0, 3.0, 3.0, 4.0, 4.0)
ROUND = Round(0, 0.3, 0.3, 100, 0, 0, 1.0, None, {"own": STILL, "bundled": STILL})


def rounds(*measured: tuple[float, float, int]) -> list[Round]:
    """Rounds of (rejection rate, KL of own passages, newly rejected)."""
    return [
        replace(
            ROUND,
            round=i,
            rejection_rate=rate,
            loop_rate=rate,
            drift={"own": STILL._replace(kl=kl), "bundled": STILL},
            rejected=rejected,
        )
        for i, (rate, kl, rejected) in enumerate(measured)
    ]


@pytest.mark.parametrize(
    ("measured", "reason", "best"),
    [
        ([(0.3, 0.0, 0)], None, 0),
        ([(0.3, 0.0, 0), (0.1, 0.01, 9)], None, 1),
        ([(0.3, 0.0, 0), (0.1, 0.02, 9), (0.1, 0.0, 5)], None, 2),
        ([(0.3, 0.0, 0), (0.1, 0.0, 9), (0.1, 0.0, 9)], "it did not improve", 2),
        (
            [(0.3, 0.0, 0), (0.1, 0.0, 9), (0.2, 0.0, 5)],
            "more held-out answers are rejected than in the round before",
            1,
        ),
        (
            [(0.3, 0.0, 0), (0.1, 0.0, 9), (0.0, 0.021, 5)],
            "the base's own passages moved by KL 0.021 nats per token, more than 0.02",
            1,
        ),
        ([(0.3, 0.0, 0), (0.0, 0.0, 9)], "none of the held-out answers is rejected any more", 1),
    ],
)
def test_when_a_walk_stops_and_which_round_is_best(
    measured: list[tuple[float, float, int]], reason: str | None, best: int
) -> None:
    assert reason_to_stop(rounds(*measured), 0.02) == reason
    assert best_round(rounds(*measured), 0.02) == best


@pytest.mark.parametrize(
    ("measured", "rejected", "reason"),
    [
        ([(0.3, 0.0, 0)], 1, None),
        ([(0.3, 0.0, 0)], 0, "nothing was rejected any more"),
        ([(0.3, 0.0, 0), (0.1, 0.0, 70)], 7, None),
        ([(0.3, 0.0, 0), (0.1, 0.0, 70)], 6, "rejected answers: 6, and 70 in the first round: too few"),
        ([(0.3, 0.0, 0), (0.1, 0.0, 70), (0.05, 0.0, 8)], 6, "rejected answers: 6, and 70 in the first round"),
    ],
)
def test_too_few_rejections_are_not_trained_on(
    measured: list[tuple[float, float, int]], rejected: int, reason: str | None
) -> None:
    stop = reason_not_to_train(rounds(*measured), rejected)
    assert stop is None if reason is None else stop is not None and stop.startswith(reason)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot_walk(tmp_path / "walk.png", rounds((0.3, 0.0, 0), (0.1, 0.01, 9)), 0.02)
    assert (tmp_path / "walk.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a walk with the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    make_runs_quick(monkeypatch)
    Path("p.txt").write_text("\n".join(f"prompt {number}" for number in range(12)))
    Path("h.txt").write_text("\n".join(f"prompt {number}" for number in range(8, 16)))
    # what the tiny model babbles holds such a pair now and then, and less often once it was rejected
    words = f"walk p.txt --held-out h.txt --model {base} -o w --judge regex:[a-m][n-z] --max-tokens 12 --max-drift 99"
    return [*words.split(), "--epochs", "2", "--lr", "1e-3"]


def read() -> dict[str, Any]:
    return json.loads(Path("w/walk.json").read_text())


def test_a_walk_has_rounds_and_resumes(
    work: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with counting_loads(monkeypatch) as loaded:
        assert main([*work, "--rounds", "1", "--json"]) == 0
    assert len(loaded) == 1
    out, err = capsys.readouterr()
    walk = read()
    assert json.loads(out) == walk
    assert walk["prompts"] == 8  # held-out prompts are not mined
    base, first = walk["rounds"]
    assert (base["round"], base["records"], base["run"]) == (0, 0, None)
    assert first["run"] == "round-1/run"
    assert first["records"] == len(list(read_records("w/round-1/records.jsonl"))) > 0
    for kind in ("own", "bundled"):
        assert base["drift"][kind]["kl"] == 0 < first["drift"][kind]["kl"]
        assert first["drift"][kind]["entropy"] != base["drift"][kind]["entropy"] > 0
        assert first["drift"][kind]["entropy_base"] == pytest.approx(base["drift"][kind]["entropy"])
    assert walk["training"]["adapter_scale"] == 1
    assert first["seconds"] > 0
    assert {record.prompt for record in read_records("w/round-1/records.jsonl")} <= {f"prompt {i}" for i in range(8)}
    assert Path("w/round-1/run/run.json").exists()
    assert "KL" in err
    assert Path("w/walk.png").stat().st_size > 1000

    assert main([*work, "--rounds", "2"]) == 0  # goes on
    longer = read()
    assert longer["rounds"][:2] == walk["rounds"]
    if len(longer["rounds"]) > 2:
        earlier = {(r.prompt, text) for r in read_records("w/round-1/records.jsonl") for text in r.rejected_responses}
        now = {(r.prompt, text) for r in read_records("w/round-2/records.jsonl") for text in r.rejected_responses}
        assert earlier <= now

    with monkeypatch.context() as ended:
        ended.setattr(walking, "reason_to_stop", lambda *_: "it did not improve")
        assert main([*work, "--rounds", "9"]) == 0
    assert read() == longer | {"stopped": "it did not improve"}

    assert main([*work[:-1], "2e-3"]) == 2
    assert "has a walk with another training" in capsys.readouterr().err
    prompts = Path(work[1]).read_text()
    Path(work[1]).write_text(prompts.replace("prompt 3", "prompt 33"))
    assert main([*work, "--rounds", "2"]) == 2
    assert "has a walk with another prompts_sha256" in capsys.readouterr().err
    Path(work[1]).write_text(prompts)
    for change, problem in (({"rounds": [{}]}, "is damaged"), ({"format": 2}, "of another version")):
        Path("w/walk.json").write_text(json.dumps(longer | change))
        assert main([*work, "--rounds", "2"]) == 2
        assert problem in capsys.readouterr().err


def test_what_a_round_killed_at_its_end_left_is_deleted(work: list[str]) -> None:
    assert main([*work, "--rounds", "1"]) == 0
    walk, left = read(), Path("w/round-1/run/settings.json")
    Path("w/walk.json").write_text(json.dumps(walk | {"rounds": walk["rounds"][:1]}))
    left.write_text("{}")
    assert main([*work, "--rounds", "1"]) == 0
    assert [entry["round"] for entry in read()["rounds"]] == [0, 1]
    assert not left.exists()


def test_nothing_to_reject_ends_the_walk(work: list[str]) -> None:
    work[work.index("--judge") + 1] = "refusal"
    assert main(work) == 0
    assert len(read()["rounds"]) == 1
    assert read()["stopped"] == "nothing was rejected any more"


@pytest.mark.slow
def test_a_killed_walk_resumes_to_the_same_rounds(work: list[str]) -> None:
    command = [sys.executable, "-c", f"from buleyean_rl.cli import main; main({[*work, '--rounds', '1']!r})"]
    subprocess.run(command, check=True, capture_output=True)
    whole = read()
    Path("w").rename("whole")
    stages = ("w/walk.json", "w/round-0/held-out.jsonl", "w/round-1/records.jsonl", "w/round-1/run/run.json")
    for stage in stages:
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not Path(stage).exists() and started.poll() is None:
            time.sleep(0.01)
        started.kill()
        started.wait()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("round-1/records.jsonl", "round-1/run/adapter_model.safetensors"):
        assert Path("w", name).read_bytes() == Path("whole", name).read_bytes()
    without_seconds = [[{**r, "seconds": 0} for r in walk["rounds"]] for walk in (whole, read())]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.parametrize("name", ["walk.json", "notes.txt"])
def test_a_folder_of_somebody_else_is_refused(name: str, work: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("w").mkdir()
    Path("w", name).write_text('{"steps": 9000}')
    with untouched(Path("w")):
        assert main(work) == 2
    assert "is not empty and has no walk of ours" in capsys.readouterr().err
    Path("w", "walk.json").write_text('{"rounds": [')
    assert main(work) == 2


def test_one_process_walks_in_a_folder(work: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with claim_folder(Path("w"), lambda _: True, "walk"):
        assert main(work) == 2
    assert f"w is in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["--model", "http://127.0.0.1:9/v1"], "cannot be trained: give a base model"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--held-out", "p.txt"], "every prompt is held out"),
        (["--held-out", "missing.txt"], "missing.txt"),
        (["--judge", "huh"], "no judge 'huh'"),
    ],
)
def test_a_wrong_request(work: list[str], change: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*work, *change]) in (1, 2)
    assert problem in capsys.readouterr().err
    assert not Path("w").exists()


def test_the_bundled_prompts_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from buleyean_rl import demo_data

    arguments: list[Any] = []
    monkeypatch.setattr(walking, "walk", lambda *words, **_: arguments.extend(words) or {})
    assert main(["walk"]) == 0
    assert (arguments[0], arguments[1]) == (demo_data.mine_prompts(), demo_data.held_out_prompts())
