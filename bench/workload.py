"""What the benchmarks on a CPU and on a GPU share: what is computed, its arithmetic, and the same without our code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from buleyean_rl.batching.batch import pad_paths
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.views import output_head, plain_model
from buleyean_rl.objectives.losses import Objective, complement_loss

ROUNDS = 10


class Stopwatch(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


class Shape(NamedTuple):
    """Multiplications with weights that a token costs, and what attention costs beside them.

    Args:
        linear: weights of the adapted layers.
        adapter: weights of their adapters.
        head: weights of the output head.
        attention: layers times the width of all heads.
    """

    linear: int
    adapter: int
    head: int
    attention: int


def shape_of(model: Any) -> Shape:
    """Of a PEFT model."""
    config = plain_model(model).config
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    width = config.num_attention_heads * config.head_dim
    return Shape(linear, adapter, output_head(model).weight.numel(), config.num_hidden_layers * width)


def arithmetic(shape: Shape, boundary: Boundary) -> float:
    """What a record costs at least, two operations for a multiply and an add.

    Per token, the linear layers three times (model, reference, gradient in the input) and the adapter three times; per
    node, three products with the output head; attention's causal half four times (twice forward, twice's worth back).
    """
    tokens = len(boundary.prompt) + len(boundary.tokens)
    attention = 2 * tokens**2 * shape.attention  # scores and values, the causal half
    return 3 * 2 * (tokens * (shape.linear + shape.adapter) + boundary.nodes * shape.head) + 4 * attention


def full_boundaries(count: int, length: int) -> list[Boundary]:
    """Records of random words that fill the length: a prompt of half of it, and an answer."""
    tokens = torch.randint(100, 30_000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    half = length // 2
    return [merge_responses(row[:half], [(row[half:], [True] * half)], [ROUNDS], [ROUNDS]) for row in tokens]


def dense_step(base: Any, objective: Objective) -> Callable[[Sequence[Boundary]], None]:
    """A training step of transformers' forward pass on padded rows, PEFT's LoRA, our loss on whole logits, AdamW."""
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)

    def loss(boundaries: Sequence[Boundary]) -> Tensor:
        batch = pad_paths(boundaries).to(base.device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with torch.no_grad(), model.disable_adapter():
            reference = plain_model(model)(**inputs).logits.flatten(0, 1)[batch.nodes].float()
        logits = model(**inputs).logits.flatten(0, 1)[batch.nodes].float()
        return complement_loss(logits, reference, batch.counts, objective).loss.mean()

    return step_of(model, loss)


def step_of(model: Any, loss: Callable[[Sequence[Boundary]], Tensor]) -> Callable[[Sequence[Boundary]], None]:
    """A training step with AdamW on a loss of some records."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)

    def step(boundaries: Sequence[Boundary]) -> None:
        loss(boundaries).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
