"""Time and memory of a run before it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from buleyean_rl.data.token_store import BoundaryFile, write_boundaries
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.training import estimate as module
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.estimate import estimate
from buleyean_rl.training.trainer import BuleyeanTrainer
from tiny import tiny_llama, tiny_tokenizer


def record(tokens: int) -> Boundary:
    return merge_responses([5] * (tokens - 3), [([20, 21, 22], [True] * 3)], [1], [1])


def file_of(folder: Path, lengths: list[int]) -> BoundaryFile:
    write_boundaries(folder / "records.arrow", [[record(length) for length in lengths]])
    return BoundaryFile(folder / "records.arrow")


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "is_cached", "passes"),
    [(2.0, -1, 10, False, 2.0), (2.0, -1, 10, True, 1.7), (1.0, 3, 3, True, 0.6)],
)
def test_time_is_that_of_a_step_of_median_length_and_its_anchors(
    epochs: float,
    max_steps: int,
    steps: int,
    is_cached: bool,
    passes: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = file_of(tmp_path, [10, 20, 30, 40, 400])
    tried: list[int] = []
    clock = [0.0]

    def step(_: Any, boundaries: list[Boundary]) -> None:
        """Takes a second, and a tenth for every token."""
        tried.append(sum(boundary.size for boundary in boundaries))
        clock[0] += 1 + tried[-1] / 10

    monkeypatch.setattr(module, "_try_step", step)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = BuleyeanConfig(
        str(tmp_path), per_device_train_batch_size=1, num_train_epochs=epochs, max_steps=max_steps, warmup_steps=0
    )
    model = SimpleNamespace(module=torch.nn.Linear(2, 2))
    trainer: Any = SimpleNamespace(args=config, language_model=model, micro_batch_limit=1280, anchor_tokens=60.0)
    need = estimate(trainer, training, lambda steps: 300 * steps, is_cached=is_cached)
    assert tried == [400, 30]  # the longest says what memory it takes
    assert need.steps == steps
    assert need.seconds == pytest.approx(4 / 30 * ((500 + 5 * 60) * passes + 100 * steps))


def test_nothing_of_a_run_changes_by_it(tmp_path: Path) -> None:
    model = attach_lora(tiny_llama(tiny_tokenizer()), lora_config(4, 8, 0.1, None))
    training = file_of(tmp_path, [12, 9, 24])
    config = BuleyeanConfig(str(tmp_path), per_device_train_batch_size=1, activation_checkpointing=True)
    trainer = BuleyeanTrainer(model, config, training)
    before, weights = torch.get_rng_state(), [weight.clone() for weight in model.parameters()]
    assert estimate(trainer, training, lambda _: 0, is_cached=False).seconds > 0
    assert torch.get_rng_state().equal(before)
    assert all(now.equal(then) for now, then in zip(model.parameters(), weights, strict=True))
    assert all(weight.grad is None for weight in model.parameters())
