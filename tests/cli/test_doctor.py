"""`doctor` reports what is present, and fails only for what `--need` requires."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import doctor, main
from buleyean_rl.kernels import build


def test_it_reports_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {
        "processor",
        "memory",
        "gpu",
        "dtype",
        "compiler",
        "kernels",
        "torch",
        "xllamacpp",
        "cache",
        "disk",
    } <= lines.keys()
    assert "threads" in lines["processor"]
    assert "OpenMP" in lines["torch"]


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    assert {finding["name"] for finding in report["findings"]} >= set(doctor.REQUIREMENTS)


def test_a_cache_where_nobody_may_look_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = os.stat

    def forbid(path: str | Path, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "buleyean-rl")):  # as root sees every folder
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, *arguments, **options)

    build.status()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "stat", forbid)
    assert main(["doctor"]) == 0
    assert str(tmp_path / "buleyean-rl") in capsys.readouterr().out


def test_a_missing_requirement_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "status", lambda: build.KernelStatus(None, "no C compiler: install gcc or clang"))
    assert main(["doctor", "--need", "transformers"]) == 0
    assert main(["doctor", "--need", "kernels", "--need", "transformers"]) == 1
    out, err = capsys.readouterr()
    assert "off: no C compiler: install gcc or clang" in out
    assert err.splitlines()[-1] == "error: missing: kernels"


def test_an_unknown_requirement_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--need", "unknown"]) == 2
    assert "choose one of kernels, gpu" in capsys.readouterr().err
