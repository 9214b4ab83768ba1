"""Answers of the bundled model: where a step's time goes, beside its bounds, and tokens a second beside llama.cpp.

    python bench/decode.py [--rounds 3]

A step's bounds: its arithmetic, at the machine's peak in bf16; its traffic, all weights and the cached keys and values
once, at the speed of reading memory. llama.cpp answers the same prompts from a file of the same weights, in bf16
and as Q8_0, with as many slots as there are conversations; each round runs everything once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import nn

import results
from buleyean_rl import demo_data
from buleyean_rl.gguf.export import export
from buleyean_rl.inference.decoding import BatchDecoder, Request
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Answer, Engine, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.kernels.decode import CACHE_BLOCK, Decoder, Draws, Rows
from buleyean_rl.models.cached_decoder import CachedDecoder
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from run import peak_flops, seconds

STEPS_OF, CONTEXTS, CONVERSATIONS = (1, 8, 64, 256), (128, 1024), (1, 8, 64)
TOKENS = 128
READ_BYTES = 1 << 29  # more than any cache holds
MEMORY_BLOCKS = 1024  # of keys and values, read again and again where there are more: as much as is read at once
UNEVEN = 2000


def read_speed() -> float:
    """Bytes a second of memory that is only read."""
    x = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / seconds(lambda: x.sum(), 9)


def step_seconds(decoder: Decoder, width: int, conversations: int, context: int, draws: int) -> float:
    """Of a step in which every conversation has so many tokens, and some draw another one at temperature 0.8."""
    needed = -(-context // CACHE_BLOCK)
    memory = torch.zeros(min(conversations * needed, MEMORY_BLOCKS), decoder.block_numbers, dtype=torch.bfloat16)
    addresses = [memory[i % len(memory)].data_ptr() for i in range(conversations * needed)]
    blocks = torch.tensor(addresses).view(conversations, needed)
    places, positions = torch.arange(conversations), torch.full((conversations,), context - 1)
    rotations = torch.ones(conversations, decoder.head_width, dtype=torch.bfloat16)
    x = torch.randn(conversations, width, dtype=torch.bfloat16)
    drawing = Draws(places[:draws], torch.full((draws,), 0.8), torch.full((draws,), 0.95), torch.rand(draws))

    def step() -> None:
        decoder.step(Rows(x.clone(), rotations, rotations, places, positions, blocks), drawing)

    return seconds(step, max(5, 200 // conversations))


def step_rows(decoder: Decoder, width: int, linear: int, head: int) -> list[dict[str, str]]:
    """Rows of the table: the time of a step, of its parts, and its bounds.

    Args:
        decoder: the model's.
        width: of its hidden states.
        linear: weights of its layers.
        head: weights of its output head.
    """
    peak, speed = peak_flops(), read_speed()
    rows = [results.figure("machine", "peak_flops", peak), results.figure("machine", "read_bytes_per_s", speed)]
    for context in CONTEXTS:
        for conversations in STEPS_OF:
            cached = conversations * context * decoder.block_numbers // CACHE_BLOCK
            attended = cached * decoder.heads // decoder.key_heads
            whole = step_seconds(decoder, width, conversations, context, conversations)
            without_head = step_seconds(decoder, width, conversations, context, 0)
            bounds = {
                "arithmetic_seconds": 2 * (conversations * (linear + head) + attended) / peak,
                "traffic_seconds": 2 * (linear + head + cached) / speed,
            }
            parts = {
                "seconds": whole,
                "head_and_drawing_seconds": whole - without_head,
                "attention_seconds": without_head - step_seconds(decoder, width, conversations, 1, 0),
                "bound_over_seconds": max(bounds.values()) / whole,
            }
            subject = f"step of {conversations} at {context} tokens"
            rows += [results.figure(subject, name, value) for name, value in (parts | bounds).items()]
    return rows


def answer_rate(engine: Engine, conversations: int) -> float:
    """Tokens a second of greedy answers to as many of the demo's prompts."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in demo_data.mine_prompts()[:conversations]]
    started = time.perf_counter()
    answers = engine.answer_many(prompts, Sampling(max_tokens=TOKENS))
    return sum(answer.tokens or 0 for answer in answers if isinstance(answer, Answer)) / (time.perf_counter() - started)


def rates(model: Any, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Tokens a second by engine and number of conversations, one a round."""
    found: dict[str, dict[int, list[float]]] = {}
    ours = TransformersEngine(model, load_tokenizer(BUNDLED), batch=max(CONVERSATIONS))
    answer_rate(ours, 1)  # compiles nothing later
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export(BUNDLED, path, ("bf16", "q8_0"), console=Console(quiet=True))
        files = {file.stem.removeprefix("model-"): file for file in sorted(Path(folder).glob("*.gguf"))}
        for _ in range(rounds):
            for conversations in CONVERSATIONS:
                found.setdefault("ours", {}).setdefault(conversations, []).append(answer_rate(ours, conversations))
                for name, file in files.items():
                    engine = LlamaCppEngine(file, parallel=conversations, context=512)
                    rate = answer_rate(engine, conversations)
                    engine.close()
                    found.setdefault(f"llama.cpp {name}", {}).setdefault(conversations, []).append(rate)
                print({name: rates[conversations][-1] for name, rates in found.items()}, file=sys.stderr)
    return found


def uneven(model: Any) -> dict[str, float]:
    """2,000 sequences of 1 to 255 tokens beside the rate of full steps, and memory above the model."""
    decoder = CachedDecoder(model)
    settings: dict[str, Any] = {"end_tokens": set(), "context": 512, "parallel": 64, "cache_bytes": 1 << 28}
    lengths = [1 + 37 * i % 255 for i in range(UNEVEN)]
    figures = {}
    for name, wanted in (("steady", [128] * 256), ("uneven", lengths)):
        requests = [Request([1 + i % 1000, 7], length) for i, length in enumerate(wanted)]
        before, started, drawn = psutil.Process().memory_info().rss, time.perf_counter(), 0
        peak = before
        for _ in BatchDecoder(decoder, **settings).run(requests):
            drawn += 1
            if drawn % 1000 == 0:
                peak = max(peak, psutil.Process().memory_info().rss)
        figures[f"{name}_tokens_per_s"] = drawn / (time.perf_counter() - started)
        figures[f"{name}_memory_bytes"] = float(peak - before)
    return figures | {"uneven_over_steady": figures["uneven_tokens_per_s"] / figures["steady_tokens_per_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    results.add_arguments(parser, results.processor())
    arguments = parser.parse_args()
    model = load_for_inference(BUNDLED, torch.device("cpu"))
    head = model.get_output_embeddings().weight.numel()
    linear = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear)) - head
    rows = step_rows(CachedDecoder(model).decoder, model.config.hidden_size, linear, head)
    rows += [results.figure("2,000 uneven sequences", name, value) for name, value in uneven(model).items()]
    for engine, by_conversations in rates(model, arguments.rounds).items():
        for conversations, values in by_conversations.items():
            rows.append(results.figure(f"{engine}, {conversations} conversations", "tokens_per_s", values))
    results.replace("decode", rows, arguments.processor, "bfloat16", arguments.output)
    own = [row for row in results.read(arguments.output) if row["processor"] == arguments.processor]
    print(results.markdown([row for row in own if row["benchmark"] == "decode"]))


if __name__ == "__main__":
    main()
