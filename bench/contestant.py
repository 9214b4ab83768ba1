"""One contestant of the benchmark, in a process of its own: train some steps, print one JSON line.

    python bench/contestant.py NAME PAIRS.jsonl STEPS

Everybody gets the same pairs, base model, LoRA (rank 16 on every linear layer, no dropout), precision (bf16 base) and
micro-batch (4), no checkpointing; rejected-only contestants do not see the chosen answers. The first step warms up and
is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from buleyean_rl.boundary import build_boundaries
from buleyean_rl.lora import lora_config
from buleyean_rl.losses import Objective, complement_loss
from buleyean_rl.models import BUNDLED, attach_lora, load_base, load_tokenizer, plain_model
from buleyean_rl.records import make_record
from buleyean_rl.report import peak_rss_bytes
from buleyean_rl.trainer import BuleyeanConfig, BuleyeanTrainer, pad_paths

MAX_LENGTH, BATCH, ROUNDS = 512, 4, 10
SHARED = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 5e-4,
    "save_strategy": "no",
    "logging_steps": 1000,
    "report_to": "none",
    "seed": 0,
}


class Stopwatch(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def ours(objective: str, pairs: list[dict[str, str]], steps: int, folder: str) -> list[float]:
    tokenizer = load_tokenizer(BUNDLED)
    records = [make_record(pair["prompt"], [pair["rejected"]], [ROUNDS], ROUNDS) for pair in pairs]
    boundaries = [boundary for boundary in build_boundaries(records, tokenizer, MAX_LENGTH) if boundary]
    model = attach_lora(load_base(BUNDLED, torch.bfloat16), lora_config(16, 32, 0.0, None))
    config = BuleyeanConfig(output_dir=folder, objective=objective, max_steps=steps, **SHARED)
    watch = Stopwatch()
    BuleyeanTrainer(model, config, boundaries, callbacks=[watch]).train()
    return watch.seconds


def plain(pairs: list[dict[str, str]], steps: int, _: str) -> list[float]:
    """Our dense loss in a bare loop: transformers' forward pass on padded rows, PEFT's LoRA, AdamW."""
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer(BUNDLED)
    records = [make_record(pair["prompt"], [pair["rejected"]], [ROUNDS], ROUNDS) for pair in pairs]
    boundaries = [boundary for boundary in build_boundaries(records, tokenizer, MAX_LENGTH) if boundary]
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(load_base(BUNDLED, torch.bfloat16), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        batch = pad_paths(boundaries[step * BATCH : (step + 1) * BATCH])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with torch.no_grad(), model.disable_adapter():
            reference = plain_model(model)(**inputs).logits.flatten(0, 1)[batch.nodes].float()
        logits = model(**inputs).logits.flatten(0, 1)[batch.nodes].float()
        complement_loss(logits, reference, batch.counts, Objective()).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def trl(name: str, pairs: list[dict[str, str]], steps: int, folder: str) -> list[float]:
    import trl as library
    from datasets import Dataset
    from peft import LoraConfig

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompts = [turn("user", pair["prompt"]) for pair in pairs]
    rejected = [turn("assistant", pair["rejected"]) for pair in pairs]
    columns: dict[str, Any] = {"prompt": prompts}
    if name == "DPO":
        columns |= {"chosen": [turn("assistant", pair["chosen"]) for pair in pairs], "rejected": rejected}
    else:
        columns |= {"completion": rejected} | ({"label": [False] * len(pairs)} if name == "KTO" else {})
    tokenizer = load_tokenizer(BUNDLED)
    config = getattr(library, f"{name}Config")(
        output_dir=folder,
        max_steps=steps,
        max_length=MAX_LENGTH,
        bf16=False,  # the base is bf16 already
        gradient_checkpointing=False,
        disable_tqdm=True,
        **SHARED,
    )
    watch = Stopwatch()
    getattr(library, f"{name}Trainer")(
        model=load_base(BUNDLED, torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[watch],
    ).train()
    return watch.seconds


def main() -> None:
    warnings.simplefilter("ignore")
    name, path, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("trl_"):
            seconds = trl(name.removeprefix("trl_").upper(), pairs, steps, folder)
        elif name == "plain":
            seconds = plain(pairs, steps, folder)
        else:
            seconds = ours(name, pairs, steps, folder)
    step = statistics.median(seconds[1:])
    print(json.dumps({"records_per_s": BATCH / step, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
