"""Does memory stay flat over many steps, and the time of a token over their length?

    python bench/steady.py

The steps are those of the trainer, on a random model small enough for two thousand of them; the lengths are those of
the bundled model, one record a pass. Writes this processor's rows of `bench/results.csv`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import results
from buleyean_rl.batching.forward import batch_losses
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.trainer import BuleyeanTrainer
from contestant import CPU

STEPS, EVERY = 2000, 100
LENGTHS = (128, 256, 512, 1024, 2048)


def random_record(length: int, vocabulary: int, seed: int) -> Boundary:
    ids = torch.randint(5, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    half = length // 2
    return merge_responses(ids[:half], [(ids[half:], [True] * (length - half))], [10], [10])


class Memory(TrainerCallback):
    """Resident bytes, every so many steps."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step % EVERY == 0:
            self.bytes.append(psutil.Process().memory_info().rss)


def memory_over_steps() -> list[int]:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_key_value_heads=1, **shape)).to(torch.bfloat16)
    records = [random_record(16 + seed % 97, 2048, seed) for seed in range(500)]
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        config = BuleyeanConfig(folder, max_steps=STEPS, save_strategy="no", logging_steps=STEPS)
        adapted = attach_lora(model, lora_config(8, 16, 0.05, None))
        BuleyeanTrainer(adapted, config, records, callbacks=[memory]).train()
    return memory.bytes


def seconds_per_token(model: Any) -> dict[int, list[float]]:
    layout, head = LAYOUTS[probe_layout(model)], output_head(model)
    batches = {length: layout([random_record(length, 40_000, length)]) for length in LENGTHS}
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for repeat in range(4):  # the first warms up
        for length, batch in batches.items():
            started = time.perf_counter()
            batch_losses(model.train(), head, batch, Objective()).loss.mean().backward()
            model.zero_grad()
            if repeat:
                times[length].append((time.perf_counter() - started) / length)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser, results.processor())
    arguments = parser.parse_args()
    memory = memory_over_steps()
    steps = {f"after {EVERY} steps": memory[0], "largest": max(memory), f"after {STEPS} steps": memory[-1]}
    rows = [results.figure(when, "rss_bytes", value) for when, value in steps.items()]
    model = attach_lora(load_for_inference(BUNDLED, CPU), lora_config(16, 32, 0.05, None))
    for length, each in seconds_per_token(model).items():
        rows.append(results.figure(f"record of {length} tokens", "seconds_per_token", each))
    precision = str(model.dtype).removeprefix("torch.")
    results.replace("steady", rows, arguments.processor, precision, arguments.output)
    for row in rows:
        print(row["subject"], row["figure"], row["value"])


if __name__ == "__main__":
    main()
