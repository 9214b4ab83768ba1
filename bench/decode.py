"""Answers of the bundled model: where a step's time goes, beside its bounds, and tokens a second beside llama.cpp.

    python bench/decode.py [--rounds 3]

A step's bounds: its arithmetic, at the machine's peak in bf16; its traffic, all weights and the cached keys and values
once, at the speed of reading memory. llama.cpp answers the same prompts from a file of the same weights, in bf16
and as Q8_0, with as many slots as there are conversations; each round runs everything once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console

import results
from buleyean_rl import demo_data
from buleyean_rl.gguf.export import export
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.kernels.decode import CACHE_BLOCK, Decoder, Draws, Rows
from buleyean_rl.models.cached_decoder import CachedDecoder
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer

CONVERSATIONS, CONTEXTS = (1, 8, 64, 256), (128, 1024)
TOKENS = 128
READ_BYTES = 1 << 29  # more than any cache holds
UNEVEN = 2000


def peak_flops() -> float:
    """Of products in bf16."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / seconds(lambda: a @ a, 9)


def read_speed() -> float:
    """Bytes a second of memory that is only read."""
    x = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / seconds(lambda: x.sum(), 9)


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def step_seconds(decoder: Decoder, width: int, conversations: int, context: int) -> float:
    """Of a step in which every conversation, with so many tokens, draws another one."""
    needed = -(-context // CACHE_BLOCK)
    memory = torch.zeros(min(conversations * needed, 2048), decoder.block_numbers, dtype=torch.bfloat16)
    blocks = torch.tensor([memory[i % len(memory)].data_ptr() for i in range(conversations * needed)])
    places = torch.arange(conversations)
    rotations = torch.ones(conversations, decoder.head_width, dtype=torch.bfloat16)
    positions = torch.full((conversations,), context - 1)
    x = torch.randn(conversations, width, dtype=torch.bfloat16)
    draws = Draws(places, torch.full((conversations,), 0.8), torch.full((conversations,), 0.95), torch.rand(conversations))

    def step() -> None:
        decoder.step(Rows(x.clone(), rotations, rotations, places, positions, blocks.view(conversations, -1)), draws)

    return seconds(step, max(5, 200 // conversations))


def step_table(decoder: CachedDecoder, width: int) -> list[dict[str, str]]:
    """Rows of the time of a step, of its parts, and of its bounds."""
    weights = decoder.weights
    matrices = [linear.weight.numel() for layer in weights.layers for linear in layer.linears]
    multiplications, peak, speed = sum(matrices) + weights.head.numel(), peak_flops(), read_speed()
    rows = [results.figure("machine", "peak_flops", peak), results.figure("machine", "read_bytes_per_s", speed)]
    whole, head = Decoder(weights), Decoder(weights._replace(layers=weights.layers[:0]), like=weights.layers[0])
    for context in CONTEXTS:
        for conversations in CONVERSATIONS:
            subject = f"step of {conversations} at {context} tokens"
            attended = 2 * len(weights.layers) * whole.heads * weights.head_width * context
            cached = conversations * context * whole.block_numbers // CACHE_BLOCK
            bounds = {
                "arithmetic_seconds": 2 * conversations * (multiplications + attended) / peak,
                "traffic_seconds": 2 * (multiplications + cached) / speed,
            }
            total = step_seconds(whole, width, conversations, context)
            parts = {
                "seconds": total,
                "head_and_sampling_seconds": step_seconds(head, width, conversations, context),
                "attention_seconds": total - step_seconds(whole, width, conversations, 1),
                "share_of_bound": max(bounds.values()) / total,
            }
            rows += [results.figure(subject, name, value) for name, value in (bounds | parts).items()]
    return rows


def answers_per_second(engine: Engine, conversations: int) -> tuple[float, int]:
    """Tokens a second, and tokens, of greedy answers to the demo's prompts."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in demo_data.mine_prompts()[:conversations]]
    started = time.perf_counter()
    tokens = sum(answer.tokens or 0 for answer in engine.answer_many(prompts, Sampling(max_tokens=TOKENS)))
    return tokens / (time.perf_counter() - started), tokens
