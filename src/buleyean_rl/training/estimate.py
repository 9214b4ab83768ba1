"""Time and memory of a run, from its longest step and a median one, tried before it starts; and keeping to that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.data.token_store import BoundaryFile
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.system.host import peak_rss_bytes
from buleyean_rl.system.wording import counted, in_words
from buleyean_rl.training.config import BuleyeanConfig, total_steps
from buleyean_rl.training.trainer import BuleyeanTrainer

READING_SHARE = 1 / 3  # of a trained token's time: a step passes through the model twice forward and once backward
CACHED_SHARE = 0.7  # of a trained token's time, once the reference's states are read from the cache
WRITTEN_BYTES_PER_SECOND = 300e6  # of checkpoints
CHECKPOINT_ADAPTERS = 3  # an adapter, and AdamW's two states of it
KERNELS_BYTES = 100 << 20  # oneDNN's, of shapes that are not tried: `environment` allows 64, some 1.5 MB each


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        seconds: of its steps, the guard's checks, its checkpoints, and measuring the trained model.
        steps: in all.
        memory_bytes: its peak in each process; on a GPU, of the GPU's memory.
        free_bytes: of the machine's memory, where the optimiser's state will not fit into it; else None.
        processes: that train together.
    """

    seconds: float
    steps: int
    memory_bytes: int
    free_bytes: int | None
    processes: int = 1

    def __str__(self) -> str:
        line = (
            f"about {in_words(self.seconds)} for {counted(self.steps, 'step')}, measuring included, "
            f"{self.memory_bytes / 1e9:.1f} GB of memory at most"
        )
        if self.processes > 1:
            line += f" in each of {self.processes} processes"
        if self.free_bytes is not None:
            remedy = "lower --micro-batch-tokens or --max-length"
            line += f" [yellow](only {self.free_bytes / 1e9:.1f} GB are free: {remedy})[/]"
        return line


def estimate(
    trainer: BuleyeanTrainer, training: BoundaryFile, read_tokens: Callable[[int], int], *, is_cached: bool
) -> Estimate:
    """Try the step with the longest micro-batch of an epoch, for memory, and one of median length, for time.

    The run itself does not change by it.

    Args:
        trainer: of the run, not yet started.
        training: what it trains on.
        read_tokens: steps -> tokens that are read for the guard and for measuring, besides training.
        is_cached: whether the reference is computed in the first epoch alone.
    """
    config, module = trainer.args, trainer.language_model.module
    size, processes = -(-config.batch_records // config.processes.size), config.processes.size
    shuffled = np.random.default_rng(config.seed).permutation(len(training))
    sizes, starts = training.sizes[shuffled], range(0, len(training), size)
    batch_tokens = np.add.reduceat(sizes, starts, dtype=np.int64)
    alone = sizes.max() > trainer.micro_batch_limit  # a record with a micro-batch to itself, longer than any other
    largest = int((np.maximum.reduceat(sizes, starts) if alone else batch_tokens).argmax())
    median = int(np.argsort(batch_tokens)[len(batch_tokens) // 2])
    devices = [] if config.device.type == "cpu" else [config.device]
    with torch.random.fork_rng(devices):  # the run itself must not notice
        for batch in dict.fromkeys((largest, median)):
            started = time.monotonic()
            _try_step(trainer, training.select(shuffled[batch * size : (batch + 1) * size])[:])
            seconds_a_token = (time.monotonic() - started) / int(batch_tokens[batch])
    adapter = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    on_gpu = config.device.type == "cuda"
    trial = torch.cuda.max_memory_allocated(config.device) if on_gpu else peak_rss_bytes() + KERNELS_BYTES
    memory = trial + 2 * adapter  # the optimiser's state is made in the first step
    steps = total_steps(config, len(training))
    epoch_tokens = int(batch_tokens.sum()) + trainer.anchor_tokens * len(training)
    batches = -(-len(training) // config.batch_records)
    tokens = epoch_tokens * steps / -(-batches // config.gradient_accumulation_steps)
    if is_cached and tokens > epoch_tokens:
        tokens = epoch_tokens + CACHED_SHARE * (tokens - epoch_tokens)
    tokens += READING_SHARE * read_tokens(steps)
    saving = checkpoints(config, steps) * CHECKPOINT_ADAPTERS * adapter / WRITTEN_BYTES_PER_SECOND
    free = psutil.virtual_memory().available
    lacking = not on_gpu and 2 * adapter > free
    seconds = seconds_a_token * tokens / processes + saving
    return Estimate(seconds, steps, memory, free if lacking else None, processes)


def checkpoints(config: BuleyeanConfig, steps: int) -> int:
    """The number of checkpoints that a run writes."""
    interval = max(1, config.save_steps if config.save_steps >= 1 else round(config.save_steps * steps))
    return 0 if config.save_strategy == "no" else max(1, int(steps // interval))


def _try_step(trainer: BuleyeanTrainer, boundaries: list[Boundary]) -> None:
    """Forward and backward as in a step, without the optimiser's part."""
    config, module = trainer.args, trainer.language_model.module
    module.train()
    batches = [batch.to(config.device) for batch in trainer.collate(list(enumerate(boundaries)))["batches"]]
    if trainer.uses_reference:
        batches = add_references(module, batches)
    for batch in batches:
        with segments_in_use(batch.segments):
            batch_losses(module, trainer.head, batch, config.loss).loss.mean().backward()
    module.zero_grad()
