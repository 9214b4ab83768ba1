"""What a run will take, tried on its longest step and a usual one before it starts; and keeping to it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.data.token_store import BoundaryFile
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.system.host import peak_rss_bytes
from buleyean_rl.system.memory import return_free_memory
from buleyean_rl.training.progress import in_words
from buleyean_rl.training.trainer import BuleyeanTrainer

KERNELS_BYTES = 100 << 20  # those of products that other rows need: `environment` lets 64 be kept, some 1.5 MB each


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        seconds: of its steps.
        steps: in all.
        memory_bytes: the most it will hold; on a GPU, of the GPU's memory.
        free_bytes: of the machine's memory, where the optimiser's state will not fit into it; else None.
    """

    seconds: float
    steps: float
    memory_bytes: int
    free_bytes: int | None

    def __str__(self) -> str:
        line = (
            f"about {in_words(self.seconds)} for {self.steps:,.0f} steps, {self.memory_bytes / 1e9:.1f} GB of memory "
            "at most"
        )
        if self.free_bytes is not None:
            remedy = "lower --micro-batch-tokens or --max-length"
            line += f" [yellow](only {self.free_bytes / 1e9:.1f} GB are free: {remedy})[/]"
        return line


def estimate(trainer: BuleyeanTrainer, training: BoundaryFile) -> Estimate:
    """Try the step with the longest row of an epoch, for memory, and one of median length, for time.

    Nothing of the run changes by it.

    Args:
        trainer: of the run, not yet started.
        training: what it trains on.
    """
    config, model = trainer.args, cast(Any, trainer.model)
    size = config.per_device_train_batch_size
    shuffled = np.random.default_rng(config.seed).permutation(len(training))
    sizes, starts = training.sizes[shuffled], range(0, len(training), size)
    tokens_of_batches = np.add.reduceat(sizes, starts, dtype=np.int64)
    alone = sizes.max() > trainer.micro_batch_limit  # a record that has a row to itself, longer than any other
    largest = int((np.maximum.reduceat(sizes, starts) if alone else tokens_of_batches).argmax())
    usual = int(np.argsort(tokens_of_batches)[len(tokens_of_batches) // 2])
    devices = [] if config.device.type == "cpu" else [config.device]
    with torch.random.fork_rng(devices):  # the run itself must not notice
        for batch in dict.fromkeys((largest, usual)):
            started = time.monotonic()
            _try_step(trainer, training.select(shuffled[batch * size : (batch + 1) * size])[:])
            seconds_a_token = (time.monotonic() - started) / int(tokens_of_batches[batch])
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    on_gpu = config.device.type == "cuda"
    tried = torch.cuda.max_memory_allocated(config.device) if on_gpu else peak_rss_bytes() + KERNELS_BYTES
    memory = tried + 2 * adapter  # the optimiser's state is made in the first step
    tokens = int(tokens_of_batches.sum()) * config.num_train_epochs
    steps = -(-len(tokens_of_batches) // config.gradient_accumulation_steps) * config.num_train_epochs
    if config.max_steps > 0:
        tokens, steps = tokens * config.max_steps / steps, config.max_steps
    free = psutil.virtual_memory().available
    lacking = not on_gpu and 2 * adapter > free
    return Estimate(seconds_a_token * tokens, steps, memory, free if lacking else None)


def _try_step(trainer: BuleyeanTrainer, boundaries: list[Boundary]) -> None:
    """Forward and backward as in a step, without the optimiser's part."""
    config, model = trainer.args, cast(Any, trainer.model)
    model.train()
    batches = [batch.to(config.device) for batch in trainer.collate(list(enumerate(boundaries)))["batches"]]
    if trainer.uses_reference:
        batches = add_references(model, batches)
    for batch in batches:
        with segments_in_use(batch.segments):
            batch_losses(model, trainer.head, batch, config.loss).loss.mean().backward()
    model.zero_grad()


class KeepMemory(TrainerCallback):
    """Keeps a process near its estimate: between steps of many lengths lies free memory that fits none of them.

    Args:
        memory_bytes: the estimate; a tenth above it, what is free goes back. Every step would pay for taking it again.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.most, self.process = 1.1 * memory_bytes, psutil.Process()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Give back, if there is more than planned for."""
        if self.process.memory_info().rss > self.most:
            return_free_memory()
