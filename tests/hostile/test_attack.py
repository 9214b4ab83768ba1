"""The harness sees what it must see."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostile.attack import Outcome, assert_clear, run_command, untouched
from hostile.scale import runs


def test_a_message_is_clear_and_a_traceback_is_not(tmp_path: Path) -> None:
    assert_clear(run_command("data", "validate", tmp_path / "missing.jsonl"))
    with pytest.raises(AssertionError):
        assert_clear(Outcome(1, "", "Traceback (most recent call last):\nValueError"))
    with pytest.raises(AssertionError):
        assert_clear(Outcome(-11, "", "killed"))


@pytest.mark.parametrize("change", ["replace", "add", "delete"])
def test_a_foreign_file_that_changes_is_seen(tmp_path: Path, change: str) -> None:
    file = tmp_path / "theirs.txt"
    file.write_text("theirs")
    watch = untouched(tmp_path)
    watch.__enter__()
    if change == "delete":
        file.unlink()
    else:
        (file if change == "replace" else tmp_path / "new").write_text("ours")
    with pytest.raises(AssertionError):
        watch.__exit__(None, None, None)


def test_the_scale_is_a_twentieth_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BULEYEAN_HOSTILE", raising=False)
    assert (runs(24_000), runs(3)) == (1_200, 1)
    monkeypatch.setenv("BULEYEAN_HOSTILE", "1")
    assert runs(24_000) == 24_000
