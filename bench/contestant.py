# ruff: noqa: E402
"""One contestant of the benchmark, in a process of its own: train some steps, print one JSON line.

    python bench/contestant.py NAME PAIRS.jsonl STEPS

`full` is `complement` on rows of exactly 512 tokens, for its memory; `epochs` is `complement` over the pairs twice, the
reference kept from the first time, and its `ratio` is the second epoch's time over the first's; `long_rows` is
`complement` with the whole of a step in one row; `base_bits_4` is `complement` on a frozen base in blocks of 4 bits.

Everybody gets the same pairs, base model, LoRA (rank 16 on every linear layer, no dropout) and micro-batch (4), no
checkpointing; rejected-only contestants do not see the chosen answers. Everybody's weights are in bf16; but on a CPU
without bf16 arithmetic torch takes a hundred times as long over products in it, and the peers compute in fp32 there.
The first step warms up and is not counted.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.modules["triton"] = None  # type: ignore[assignment] # 70 MB for the tests, which torch for a CPU does not bring

import torch

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import make_record
from buleyean_rl.data.trie import Boundary, build_boundaries
from buleyean_rl.kernels.precision import default_dtype
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import open_model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head
from buleyean_rl.models.weights import load_base, load_tokenizer
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.system.host import peak_rss_bytes
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.reference_cache import ReferenceCache, entry_format
from buleyean_rl.training.trainer import BuleyeanTrainer
from workload import ROUNDS, Stopwatch, arithmetic, dense_step, full_boundaries, shape_of

MAX_LENGTH, BATCH = 512, 4
LONG_ROW = MAX_LENGTH * BATCH
CPU = torch.device("cpu")
PRECISION = default_dtype(CPU)  # of the peers
SHARED = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 5e-4,
    "save_strategy": "no",
    "logging_steps": 1000,
    "report_to": "none",
    "seed": 0,
}


def our_boundaries(pairs: list[dict[str, str]]) -> Sequence[Boundary]:
    records = [make_record(pair["prompt"], [pair["rejected"]], [ROUNDS], ROUNDS) for pair in pairs]
    boundaries = build_boundaries(records, Encoder(load_tokenizer(BUNDLED), MAX_LENGTH))
    return [boundary for boundary in boundaries if boundary]


def ours(
    objective: str, boundaries: Sequence[Boundary], folder: str, bits: int = 16, **settings: Any
) -> tuple[list[float], list[float]]:
    """Seconds of each step, and its arithmetic."""
    model = attach_lora(open_model(BUNDLED, CPU, base_bits=bits).module, lora_config(16, 32, 0.0, None))
    config = BuleyeanConfig(output_dir=folder, objective=objective, **settings, **SHARED)
    watch = Stopwatch()
    references = None
    if "num_train_epochs" in settings:
        kept = entry_format(output_head(model), config.loss)
        references = ReferenceCache(Path(folder, "references"), [boundary.nodes for boundary in boundaries], kept)
    trainer = BuleyeanTrainer(model, config, boundaries, callbacks=[watch], references=references)
    collate, shape, work = trainer.data_collator, shape_of(model), []

    def counting(numbered: Sequence[tuple[int, Boundary]]) -> Any:
        work.append(sum(arithmetic(shape, boundary) for _, boundary in numbered))
        return collate(numbered)

    trainer.data_collator = counting
    trainer.train()
    return watch.seconds, work


def plain(pairs: list[dict[str, str]], steps: int) -> list[float]:
    """Our dense loss in a bare loop."""
    boundaries, seconds = itertools.cycle(our_boundaries(pairs)), []
    step = dense_step(load_base(BUNDLED, PRECISION), Objective())
    for _ in range(steps):
        started = time.perf_counter()
        step(list(itertools.islice(boundaries, BATCH)))
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
        bf16=False,  # the base is what it is to be already
        gradient_checkpointing=False,
        disable_tqdm=True,
        **SHARED,
    )
    watch = Stopwatch()
    getattr(library, f"{name}Trainer")(
        model=load_base(BUNDLED, PRECISION),
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
    work: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("trl_"):
            seconds = trl(name.removeprefix("trl_").upper(), pairs, steps, folder)
        elif name == "plain":
            seconds = plain(pairs, steps)
        elif name == "full":
            seconds, work = ours("complement", full_boundaries(steps * BATCH, MAX_LENGTH), folder, max_steps=steps)
        elif name == "long_rows":
            seconds, work = ours(
                "complement", our_boundaries(pairs), folder, max_steps=steps, micro_batch_tokens=LONG_ROW
            )
        elif name == "base_bits_4":
            seconds, work = ours("complement", our_boundaries(pairs), folder, bits=4, max_steps=steps)
        elif name == "epochs":
            seconds, work = ours("complement", our_boundaries(pairs), folder, num_train_epochs=2)
        else:
            seconds, work = ours(name, our_boundaries(pairs), folder, max_steps=steps)
    half = len(seconds) // 2
    result = {
        "records_per_s": BATCH * len(seconds[1:]) / sum(seconds[1:]),
        "peak_rss_bytes": peak_rss_bytes(),
        "ratio": sum(seconds[half:]) / sum(seconds[:half]),
    }
    if name in ("complement", "full"):  # the others do less, or more
        result["flops_per_s"] = sum(work[1 : len(seconds)]) / sum(seconds[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
