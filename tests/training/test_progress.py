"""What a person sees of a training run."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from buleyean_rl.system import progress
from buleyean_rl.training.progress import ShowProgress

FIGURES = {"loss": 1.25, "kl": 0.5, "contrast": 3.0, "floor": 0.75, "gap": 0.5}


def test_eighty_columns_fit_the_bar_and_the_mean_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    seen = io.StringIO()
    shown = ShowProgress(Console(file=seen, width=80, force_terminal=True, color_system=None))
    states = [SimpleNamespace(max_steps=1125, global_step=step) for step in (0, 11, 12)]
    shown.on_train_begin(None, states[0], None)
    shown.on_log(None, states[1], None, logs=FIGURES | {"tokens": 900, "seconds": 1.0})
    clock.now += 1  # it is not drawn more often
    shown.on_log(None, states[2], None, logs=FIGURES | {"tokens": 100, "seconds": 9.0})
    shown.on_log(None, states[2], None, logs={"train_runtime": 10.0})  # transformers' own summary
    shown.stop()
    bar, line = seen.getvalue().split("training")[-1].splitlines()[:2]
    assert "12 of 1,125 steps" in bar
    assert ":" in bar.split("steps")[1]  # the time left
    assert line.strip() == "loss 1.2500  KL 0.5000  contrast 3.0000  gap 0.5000  100 tokens/s"


def test_a_quiet_console_has_no_output() -> None:
    seen = io.StringIO()
    shown = ShowProgress(Console(file=seen, quiet=True))
    shown.on_train_begin(None, SimpleNamespace(max_steps=3, global_step=0), None)
    shown.stop()
    assert not seen.getvalue()


def test_a_log_gets_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    seen = io.StringIO()
    shown = ShowProgress(Console(file=seen, width=80))
    shown.on_train_begin(None, SimpleNamespace(max_steps=9, global_step=5), None)
    for step in (6, 7, 8, 9):
        clock.now += 45  # seconds, that a step takes
        shown.on_log(
            None, SimpleNamespace(max_steps=9, global_step=step), None, logs=FIGURES | {"tokens": 9, "seconds": 1}
        )
    shown.stop()
    assert seen.getvalue().splitlines() == [
        f"training: {step} of 9 steps, about {left} left: "
        "loss 1.2500  KL 0.5000  contrast 3.0000  gap 0.5000  9 tokens/s"
        for step, left in ((6, "2 minutes"), (7, "2 minutes"), (8, "45 seconds"), (9, "0 seconds"))
    ]
