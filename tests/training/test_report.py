"""What a run leaves to read: a plot, a card, and last run.json."""

from __future__ import annotations

import html
import json
import math
import re
import struct
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from buleyean_rl.system.host import peak_rss_bytes
from buleyean_rl.training.loss_plot import _smooth, plot_losses
from buleyean_rl.training.report import result_lines, write_report
from sample_report import REPORT

LOG = [
    {"step": step, "loss": 1 / step, "floor": 0.1, "gap": 1 / step - 0.1, "kl": 0.5, "contrast": 0.2}
    for step in range(1, 8)
] + [{"step": 7, "train_runtime": 1.0}]  # transformers' own last entry has no loss


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk is whole."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    position, kinds, size = 8, [], (0, 0)
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        kinds.append(kind)
        position += 12 + length
    assert kinds[-1] == b"IEND"
    return size


LOOK = {"step": 4, "texts": REPORT.drift, "loop_rate": 0.25}
GUARD = {"limits": {"kl": 0.05}, "checks": [LOOK], "stop_reason": None, "restored_step": None}
STOPPED = GUARD | {"checks": [LOOK, LOOK | {"step": 7, "texts": {}}], "stop_reason": "it moved", "restored_step": 4}


@pytest.mark.parametrize("log", [LOG, LOG[:1]], ids=["several steps", "one step"])
def test_the_plot_is_a_whole_png(log: list[dict[str, float]], tmp_path: Path) -> None:
    write_report(tmp_path, REPORT, log)
    assert png_size((tmp_path / "loss.png").read_bytes()) == (960, 720)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, {"held-out records, before and after: 0.900 to 0.500", "bundled texts: 0.010 at the end"}),
        (
            {"records_held_out": 0, "guard": GUARD},
            {"some of the records, before and after: 0.900 to 0.500", "25% loop"},
        ),
        ({"guard": STOPPED}, {"the guard ended the run", "the guard's limit, 0.05"}),
    ],
)
def test_the_plot_says_what_a_run_came_to(changes: dict[str, Any], shown: set[str], tmp_path: Path) -> None:
    plot_losses(tmp_path / "p.svg", asdict(REPORT) | changes, LOG, "$my_run")
    drawn = {html.unescape(text) for text in re.findall(r"<!-- (.*?) -->", (tmp_path / "p.svg").read_text())}
    assert shown | {"$my_run"} <= drawn
    assert ("the guard ended the run" in drawn) == (changes.get("guard") is STOPPED)


def test_run_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("buleyean_rl.training.report.write_json", full)
        with pytest.raises(OSError, match="No space"):
            write_report(tmp_path, REPORT, LOG)
    assert {"loss.png", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "run.json").exists()
    write_report(tmp_path, REPORT, LOG)
    assert json.loads((tmp_path / "run.json").read_text()) == {"format": 2} | asdict(REPORT)


def moved(kl: float) -> dict[str, dict[str, float]]:
    """The report's drift, with another KL of the bundled texts."""
    return REPORT.drift | {"bundled": REPORT.drift["bundled"] | {"kl": kl}}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        (
            {"rejected_nll_final": 1.25 + math.log(9), "drift": {"own": REPORT.drift["own"] | {"kl": 0.004}}},
            "trained: the rejected answers are now 9.0 times less likely per token; other text unchanged (KL 0.004)",
        ),
        (
            {"rejected_nll_final": 1.25 + math.log(1.05), "drift": moved(0.03)},
            "trained: the rejected answers are now 5.0% less likely per token; other text little changed (KL 0.030)",
        ),
        (
            {"rejected_nll_final": 1.25, "drift": moved(0.3)},
            "[yellow]trained, and the rejected answers did not become less likely[/]; other text changed (KL 0.300)",
        ),
        ({"rejected_nll_base": None}, "trained; other text little changed (KL 0.012)"),
    ],
)
def test_the_last_line_is_a_verdict(changes: dict[str, Any], verdict: str) -> None:
    assert result_lines(replace(REPORT, **changes)).splitlines()[-1] == verdict


def test_smoothing_is_a_running_mean() -> None:
    assert _smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    assert _smooth([]) == []
    assert _smooth([0.0, 2.0] * 20)[:4] == [0.0, 1.0, 1.0, 1.0]  # forty values: means of two


def test_peak_memory_is_in_bytes() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.99 * resident < peak_rss_bytes() < 100 * resident  # the two counters lag each other a little
