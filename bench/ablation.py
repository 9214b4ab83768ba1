"""What each technique gains alone: a step without it over a step with everything.

    python bench/ablation.py [--pairs PAIRS.jsonl] [--repeats 3]

All in one process and in turn, so that a machine whose speed drifts does not decide; the default settings of a run
(LoRA of rank 16 on every linear layer, dropout 0.05, the precision of this CPU), eight records. Writes this processor's
rows of `bench/results.csv`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import results
from buleyean_rl.batching.batch import Batch, pack, pad_paths
from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.batching.layout import choose_layout
from buleyean_rl.models import (
    adapted_linear,
    blockwise_attention,
    fused_decoder,
    fused_layers,
    lora,
    packed_attention,
)
from buleyean_rl.models import output_head as head_passes
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.compute import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head, plain_model
from buleyean_rl.objectives import vocabulary_softmax
from buleyean_rl.objectives.losses import Objective
from contestant import CPU, our_boundaries
from run import bundled_pairs, read_pairs

IN_TORCH: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("available", "attends", "multiplies", "has_head_sums"), lambda *_: False),
    "loss_passes": lambda *_: None,
    "depth_of": lambda size, _: size,
}
HEAD_SUMS = (vocabulary_softmax, "matmul", "has_head_sums")
LOSS_PASSES = (head_passes, "elementwise", "loss_passes")
ATTENTION = (packed_attention, "attention", "attends")
ATTENTION_SOFTMAX = (blockwise_attention, "abi", "available")
SWEEPS = (fused_layers, "abi", "available")
PRODUCTS = (lora, "matmul", "multiplies")
PADDED_RANKS = (adapted_linear, "matmul", "depth_of")
DROPOUT = (adapted_linear, "abi", "available")


@contextmanager
def in_torch(*functions: tuple[Any, str, str]) -> Iterator[None]:
    """A module finds functions of `kernels` that send it to torch.

    Args:
        functions: the module, its name for the part of `kernels`, and the function.
    """
    with ExitStack() as stack:
        for module, part, name in functions:
            replaced = SimpleNamespace(**{**vars(getattr(module, part)), name: IN_TORCH[name]})
            stack.enter_context(patch.object(module, part, replaced))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    results.add_arguments(parser, results.processor())
    arguments = parser.parse_args()
    records = our_boundaries((read_pairs(arguments.pairs) if arguments.pairs else bundled_pairs())[:8])
    model = attach_lora(load_for_inference(BUNDLED, CPU), lora.lora_config(16, 32, 0.05, None))
    choose_layout(model)
    head = output_head(model)
    rows = [pack(records[i : i + 2]) for i in range(0, 8, 2)]
    known = [
        replace(batch, rest=vocabulary_softmax.reference_softmax(head, reference, batch.counts))
        for batch in add_references(model, rows)
        if (reference := batch.reference) is not None
    ]

    def step(batches: Sequence[Batch], together: bool = True) -> None:
        model.train()
        for batch in add_references(model, batches) if together else batches:
            batch_losses(model, head, batch, Objective()).loss.mean().backward()
        model.zero_grad()

    @contextmanager
    def plain_attention() -> Iterator[None]:
        plain = plain_model(model)
        plain.set_attn_implementation("sdpa")
        yield
        plain.set_attn_implementation(packed_attention.PACKED)

    def by_layers() -> AbstractContextManager[Any]:
        return patch.object(fused_decoder.Decoder, "knows", lambda *_: False)

    @contextmanager
    def by_modules() -> Iterator[None]:
        with by_layers(), patch.object(fused_decoder.DecoderLayer, "knows", lambda *_: False):
            yield

    def in_passes() -> AbstractContextManager[Any]:
        return patch.object(fused_decoder._OneCall, "of", lambda *_: None)

    @contextmanager
    def sweeps_in_torch() -> Iterator[None]:
        with in_passes(), in_torch(SWEEPS):
            yield

    @contextmanager
    def alone() -> Iterator[None]:
        groups = {layer: layer.group for layer in model.modules() if isinstance(layer, lora.LoraLinear)}
        for layer in groups:
            layer.group = None
        with by_modules():
            yield
        for layer, group in groups.items():
            layer.group = group

    def separately() -> AbstractContextManager[Any]:
        return patch.object(lora.LinearGroup, "state", lambda _: None)

    @contextmanager
    def torch_products(*functions: tuple[Any, str, str]) -> Iterator[None]:
        groups = {layer.group for layer in model.modules() if isinstance(layer, lora.LoraLinear)}
        with in_torch(PRODUCTS, PADDED_RANKS, *functions):
            for group in groups:
                group._known = {}  # made anew, as narrow as it is
            yield
        for group in groups:
            group._known = {}

    padded = [pad_paths(records[i : i + 4]) for i in range(0, 8, 4)]
    everything: Callable[[], None] = lambda: step(rows)  # noqa: E731
    variants: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], None]]] = {
        "one call, and products in matrix registers": (torch_products, everything),
        "the loss in matrix registers": (lambda: in_torch(HEAD_SUMS), everything),
        "the loss in C": (lambda: in_torch(HEAD_SUMS, LOSS_PASSES), everything),
        "all layers in one call, not one each": (by_layers, everything),
        "layers in one call": (in_passes, everything),
        "one call, and attention in matrix registers": (lambda: in_torch(ATTENTION), everything),
        "one call, and attention in C": (lambda: in_torch(ATTENTION, ATTENTION_SOFTMAX), everything),
        "one call, and RMSNorm and SwiGLU in C": (sweeps_in_torch, everything),
        "these, and dropout in C": (lambda: torch_products(DROPOUT), everything),
        "layers as one node": (by_modules, everything),
        "the node, and layers with one input together": (alone, everything),
        "the node, and LoRA in the base's type": (separately, everything),
        "packed rows and own attention": (plain_attention, lambda: step(padded)),
        "rows of two records, not one": (nullcontext, lambda: step([pack([record]) for record in records])),
        "rows of two records, not four": (nullcontext, lambda: step([pack(records[:4]), pack(records[4:])])),
        "the reference in one row": (nullcontext, lambda: step(rows, together=False)),
        "the reference known": (nullcontext, lambda: step(known)),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(arguments.repeats + 1):  # the first warms up
        for name, (changed, work) in variants.items():
            started = time.perf_counter()
            everything()
            full = time.perf_counter() - started
            with changed():
                started = time.perf_counter()
                work()
            if repeat:
                times[name].append((time.perf_counter() - started) / full)
    table = [results.figure(name, "times_as_long", ratios) for name, ratios in times.items()]
    precision = str(model.dtype).removeprefix("torch.")
    results.replace("ablation", table, arguments.processor, precision, arguments.output)
    for name, ratios in times.items():
        print(f"{name:44} {sorted(ratios)}")


if __name__ == "__main__":
    main()
