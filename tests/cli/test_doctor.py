"""The doctor says what is there, and fails only for what was asked for."""

from __future__ import annotations

import json

import pytest

from buleyean_rl.cli import doctor, main
from buleyean_rl.kernels import build


def test_it_says_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"processor", "memory", "gpu", "dtype", "kernels", "torch", "xllamacpp", "cache", "disk"} <= lines.keys()
    assert "threads" in lines["processor"]


def test_as_json_it_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    assert {finding["name"] for finding in report["findings"]} >= set(doctor.NEEDS)


def test_what_is_needed_and_missing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "status", lambda: build.KernelStatus(None, "no C compiler: install gcc or clang"))
    assert main(["doctor", "--need", "transformers"]) == 0
    assert main(["doctor", "--need", "kernels", "--need", "transformers"]) == 1
    out, err = capsys.readouterr()
    assert "off: no C compiler: install gcc or clang" in out
    assert err.splitlines() == ["error: missing: kernels"]


def test_a_need_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--need", "a miracle"]) == 2
    assert "name one of kernels, gpu" in capsys.readouterr().err
