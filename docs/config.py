"""Print the page of settings: every setting of a training run, with what it accepts."""

from __future__ import annotations

from buleyean_rl.training.config import default_settings
from buleyean_rl.training.settings import settings_table

PAGE = """\
# Settings

Written by `make docs` from the package; a test fails where the two differ.

A settings file (`buleyean train ... --config run.yaml`) is YAML, a setting a line.
`buleyean train --print-config > run.yaml` writes a whole one, each setting below what it does and accepts, from the
same table as this page. From Python they are the arguments of `BuleyeanConfig`. What is not in this table is refused,
also where transformers' `TrainingArguments` has it: it would have no effect here. `preset` sets several at once
([presets](training.md#presets)); settings go over it.

{table}

- The precision is the machine's fastest (`buleyean doctor` says which), so there is no `fp16` or `bf16`.
- Every setting is recorded in the run folder. A run is resumed with the settings it was begun with, or not at all.
- One run is one process: under torchrun or accelerate with more than one, `train` refuses.
- TensorBoard: `pip install tensorboard`, set `report_to: tensorboard`, look with `tensorboard --logdir my-run/runs`.
  It writes files and sends nothing. For other trackers, pass their `TrainerCallback` to
  `buleyean_rl.train(..., callbacks=[...])`.
"""


def page() -> str:
    """The whole page."""
    return PAGE.format(table=settings_table(default_settings()))


if __name__ == "__main__":
    print(page(), end="")
