"""`buleyean runs`: what it lists, compares and deletes, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import main
from buleyean_rl.models.run_files import SETTINGS_FORMAT, final_kl
from buleyean_rl.system.locks import FileLock
from buleyean_rl.training.report import RunReport
from buleyean_rl.training.runs import find_runs, summarise
from sample_report import CONFIG, REPORT


def write_run(folder: Path, report: RunReport = REPORT, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"format": 2} | asdict(report) | changes
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "adapter_model.safetensors").touch()
    return folder


def write_stopped(folder: Path, **changes: Any) -> Path:
    checkpoint = folder / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    settings = {"format": SETTINGS_FORMAT, "model": "org/base", "records_sha256": "ab", "config": CONFIG} | changes
    (folder / "settings.json").write_text(json.dumps(settings))
    (checkpoint / "checkpoint.json").write_text('{"format": 1, "step": 40, "files": {}}')
    (checkpoint / "trainer_state.json").write_text('{"global_step": 40, "max_steps": 104}')
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_runs_below_a_folder_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("b/first"))
    write_stopped(Path("a"))
    write_run(Path(".hidden/run"))
    assert [str(run) for run in find_runs(Path("."))] == ["a", "b/first"]
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    _, stopped, first = out.splitlines()
    assert stopped.split()[:2] == ["a", "org/base"]
    assert "stopped at 40 of 104" in stopped
    assert first.split()[:2] == ["b/first", "org/base"]
    assert first.split()[4:] == ["1,125", "1.25", "->", "2.50", "0.012"]
    assert err.startswith("Next: ")
    assert err.rstrip().endswith(" chat b/first")


def test_json_has_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"))
    write_stopped(Path("b"), failed="it diverged")
    write_run(Path("c"), format=1)
    assert main(["runs", "b", "a", "c", "a", "--json"]) == 0
    failed, finished, old = json.loads(capsys.readouterr().out)["runs"]
    assert (failed["folder"], failed["state"], failed["problem"]) == ("b", "failed", "it diverged")
    assert (finished["state"], finished["steps"], finished["kl"]) == ("finished", 1125, 0.012)
    assert (old["state"], "format 1" in old["problem"]) == ("unreadable", True)


def test_a_run_under_way_is_running() -> None:
    run = write_stopped(Path("a"))
    with FileLock(run / ".lock"):
        assert summarise(run).state in ("running", "stopped")  # a lock of this process may not be seen by it


def test_compare_shows_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"))
    write_run(Path("b"), replace(REPORT, config=CONFIG | {"tau": 2.0}))
    assert main(["runs", "a", "b", "--compare"]) == 0
    out = capsys.readouterr().out
    assert ["tau", "1.0", "2.0"] in [line.split() for line in out.splitlines()]
    assert "lora_rank" not in out
    assert main(["runs", "a", "--compare"]) == 2
    assert "takes two or more runs" in capsys.readouterr().err


def test_no_runs_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("no runs in .\nNext: ")
    assert main(["runs", "none"]) == 2


def test_delete_takes_what_a_run_wrote_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (write_run(Path("a")), write_stopped(Path("b"))):
        (folder / "notes.txt").write_text("mine")
        (folder / "checkpoint-7").mkdir()
        (folder / "checkpoint-7" / "mine").touch()
    write_run(Path("c"))
    assert main(["runs", "a", "b", "c", "--delete", "--yes", "--json"]) == 0
    out, err = capsys.readouterr()
    left = [f"{run}/{name}" for run in "ab" for name in ("checkpoint-7", "notes.txt")]
    assert json.loads(out) == {"deleted": ["a", "b", "c"], "left": left}
    assert sorted(str(path) for path in Path(".").glob("*/*")) == left
    assert not Path("c").exists()
    assert "left there, as no run wrote it: a/checkpoint-7, a/notes.txt" in err


def test_what_is_no_run_of_ours_stays(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("a"))
    Path("link").symlink_to("a")
    other = Path("other")
    other.mkdir()
    (other / "run.json").write_text('{"model": "x"}')
    for words, problem in (
        (["other", "--delete", "--yes"], "other has no run of ours: nothing is deleted"),
        (["a", "none", "--delete", "--yes"], "none has no run of ours"),
        (["link", "--delete", "--yes"], "link is a link"),
        (["a", "--delete"], "add --yes"),
        (["--delete", "--yes"], "name the run folders"),
        (["a", "--yes"], "--yes confirms --delete"),
        (["a", "--delete", "--compare"], "one at a time"),
    ):
        assert main(["runs", *words]) == 2
        assert problem in capsys.readouterr().err
    assert (run / "run.json").exists()
    assert (other / "run.json").exists()


def test_the_kl_of_a_run_is_of_the_text_that_moved_farthest() -> None:
    report = asdict(REPORT)
    assert final_kl(report) == 0.012
    del report["drift"]
    assert final_kl(report) is None  # of an earlier version
