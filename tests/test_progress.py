"""What a person sees of a training run."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from buleyean_rl.progress import ShowProgress


def test_eighty_columns_show_all_of_it_and_the_speed_of_all_steps() -> None:
    seen = io.StringIO()
    shown = ShowProgress(Console(file=seen, width=80, force_terminal=True, color_system=None))
    shown.on_train_begin(None, SimpleNamespace(max_steps=1125, global_step=0), None)
    figures = {"loss": 1.25, "kl": 0.5, "contrast": 3.0, "floor": 0.75, "gap": 0.5}
    shown.on_log(None, SimpleNamespace(global_step=1), None, logs=figures | {"tokens": 900, "seconds": 1.0})
    shown.on_log(None, SimpleNamespace(global_step=2), None, logs=figures | {"tokens": 100, "seconds": 9.0})
    shown.on_log(None, SimpleNamespace(global_step=2), None, logs={"train_runtime": 10.0})  # transformers' own summary
    shown.stop()
    bar, line = seen.getvalue().split("training")[-1].splitlines()[:2]
    assert "2/1125" in bar
    assert ":" in bar.split("2/1125")[1]  # the time left
    assert line.strip() == "loss 1.2500  KL 0.5000  contrast 3.0000  gap 0.5000  100 tokens/s"


def test_a_quiet_console_stays_quiet() -> None:
    seen = io.StringIO()
    shown = ShowProgress(Console(file=seen, quiet=True))
    shown.on_train_begin(None, SimpleNamespace(max_steps=3, global_step=0), None)
    shown.stop()
    assert not seen.getvalue()
