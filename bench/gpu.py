"""A training step on a GPU, beside the same loss on whole logits; writes its rows of `bench/results.csv`.

    python bench/gpu.py [--steps 8]

Models of the shapes of SmolLM2 135M and 360M with random weights, in bf16; LoRA of rank 16 on every linear layer, no
dropout; records of 512 random tokens, half of them a prompt. `fused` is a step as this package's trainer makes it,
`dense` one of transformers' forward pass on padded rows, PEFT's LoRA and the same loss on whole logits, both in a bare
loop with AdamW. The two take turns, and the first two steps of each are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import results
from buleyean_rl.batching.forward import batch_losses
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.views import output_head
from buleyean_rl.objectives.losses import Objective
from workload import arithmetic, dense_step, full_boundaries, shape_of, step_of

LENGTH, WARM = 512, 2
BATCHES = (4, 16, 64)
PEAK_SIZE = 8192
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "360M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}
OBJECTIVE = Objective(min_p=0.0)  # of a random model all tokens are plausible


def random_model(shape: dict[str, Any]) -> LlamaForCausalLM:
    """On the GPU, in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192, **shape)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def fused_step(base: Any, objective: Objective) -> Callable[[Sequence[Boundary]], None]:
    """A training step of packed rows, our LoRA and the loss in tiles."""
    model = attach_lora(base, lora_config(16, 32, 0.0, None))
    layout, head = LAYOUTS[probe_layout(model)], output_head(model)

    def loss(boundaries: Sequence[Boundary]) -> Tensor:
        return batch_losses(model, head, layout(boundaries).to(base.device), objective).loss.mean()

    return step_of(model, loss)


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_flops() -> float:
    """Of a bf16 matrix product."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(12)]
    return float(2 * PEAK_SIZE**3 / statistics.median(times[WARM:]))


def measured(make: Callable[..., Any], shape: dict[str, Any], batch: int, steps: int, flops: float) -> dict[str, float]:
    """Tokens/s, operations/s and most memory; nothing where it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    boundaries = full_boundaries(batch * (steps + WARM), LENGTH)
    rows = [boundaries[first : first + batch] for first in range(0, len(boundaries), batch)]
    try:
        step = make(random_model(shape), OBJECTIVE)
        median = statistics.median([seconds(partial(step, row)) for row in rows][WARM:])
    except torch.cuda.OutOfMemoryError:
        return {}
    return {
        "tokens_per_s": batch * LENGTH / median,
        "flops_per_s": flops * batch / median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    results.add_arguments(parser, torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    (record,) = full_boundaries(1, LENGTH)
    rows, peaks = [], []
    for name, shape in SHAPES.items():
        flops = arithmetic(shape_of(attach_lora(random_model(shape), lora_config(16, 32, 0.0, None))), record)
        for batch in BATCHES:
            for run, make in (("fused", fused_step), ("dense", dense_step)):
                peaks.append(peak_flops())
                subject = f"{name}, {batch} records a step, {run}"
                figures = measured(make, shape, batch, arguments.steps, flops)
                if figures:
                    figures["peak_share"] = figures.pop("flops_per_s") / peaks[-1]
                    rows += [results.figure(subject, figure, value) for figure, value in figures.items()]
                else:
                    rows.append({"subject": subject, "figure": "does not fit"})
                print(subject, figures, file=sys.stderr, flush=True)
    rows.append(results.figure("machine", "peak_flops", peaks))
    results.replace("gpu", rows, arguments.processor, "bfloat16", arguments.output)


if __name__ == "__main__":
    main()
