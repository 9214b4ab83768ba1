"""Answers of the bundled model: a step's parts beside its bounds, an adapter's cost, tokens a second beside llama.cpp.

    python bench/decode.py [PART ...] [--rounds 2] [--sequences 2000]

A step's bounds: its arithmetic, at the machine's peak in bf16; its traffic, all weights and the cached keys and values
once, at the speed of reading memory; a large product and a sweep over memory run in turn with the steps. llama.cpp
answers the same prompts from a file of the same weights, in bf16 and as Q8_0, with as many slots as there are
conversations; each round runs everything once. `one` is a step of one conversation beside a read of the same bytes, in
turn; `accuracy` compares the drawn tokens' log-probabilities, and transformers' in bf16, with those in fp32. Each part
replaces its own rows of the table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.cached_decoder import CachedDecoder
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_base, load_tokenizer
from run import seconds

STEPS_OF, CONTEXTS, CONVERSATIONS = (1, 8, 64, 256), (128, 1024), (1, 8, 64)
TOKENS = 128
MATRIX = 2048  # rows and columns of the product that shows the machine's peak
READ_BYTES = 1 << 29  # more than any cache holds
MEMORY_BLOCKS = 1024  # of keys and values, read again and again where there are more: as much as is read at once


def make_step(
    decoder: Decoder, width: int, conversations: int, context: int, draws: int, temperature: float = 0.8
) -> Callable[[], None]:
    """A step in which every conversation has so many tokens, and some draw another one."""
    needed = -(-context // CACHE_BLOCK)
    memory = torch.zeros(min(conversations * needed, MEMORY_BLOCKS), decoder.block_numbers, dtype=torch.bfloat16)
    addresses = [memory[i % len(memory)].data_ptr() for i in range(conversations * needed)]
    blocks = torch.tensor(addresses).view(conversations, needed)
    places, positions = torch.arange(conversations), torch.full((conversations,), context - 1)
    rotations = torch.ones(conversations, decoder.head_width, dtype=torch.bfloat16)
    x = torch.randn(conversations, width, dtype=torch.bfloat16)
    drawing = Draws(places[:draws], torch.full((draws,), temperature), torch.full((draws,), 0.95), torch.rand(draws))

    def step(_memory: torch.Tensor = memory) -> None:  # which has to live as long
        decoder.step(Rows(x.clone(), rotations, rotations, places, positions, blocks), drawing)

    return step


def in_turn(steps: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """The seconds of each of some steps, one after the other, again and again."""
    for step in steps:
        step()
    return [[seconds(step, 1, warm=False) for step in steps] for _ in range(repeats)]


def step_rows(model: Any) -> list[dict[str, str]]:
    """The time of a step, of its parts, and its bounds."""
    decoder, width = CachedDecoder(model).decoder, model.config.hidden_size
    weights = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    a, x = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16), torch.ones(READ_BYTES // 8, dtype=torch.int64)
    rows, peaks, speeds = [], [], []
    for context in CONTEXTS:
        for conversations in STEPS_OF:
            cached = conversations * context * decoder.block_numbers // CACHE_BLOCK
            attended = cached * decoder.heads // decoder.key_heads
            kinds = [(context, conversations), (context, 0), (1, 0)]
            steps = [make_step(decoder, width, conversations, length, draws) for length, draws in kinds]
            greedy = make_step(decoder, width, conversations, context, conversations, 0)
            times = in_turn([*steps, lambda: a @ a, lambda: x.sum(), greedy], max(20, 200 // conversations))
            whole, without_head, without_attention, product, read, _ = map(statistics.median, zip(*times, strict=True))
            arithmetic = (conversations * weights + attended) / MATRIX**3  # of such a product
            traffic = 2 * (weights + cached) / READ_BYTES
            parts = {
                "seconds": whole,
                "head_and_drawing_seconds": whole - without_head,
                "attention_seconds": without_head - without_attention,
                "arithmetic_seconds": arithmetic * product,
                "traffic_seconds": traffic * read,
                "bound_over_seconds": statistics.median(
                    max(arithmetic * p, traffic * r) / s for s, _, _, p, r, _ in times
                ),
                "bound_over_greedy": statistics.median(max(arithmetic * p, traffic * r) / s for *_, p, r, s in times),
            }
            subject = f"step of {conversations} at {context} tokens"
            rows += [results.figure(subject, name, value) for name, value in parts.items()]
            peaks.append(2 * MATRIX**3 / product)
            speeds.append(READ_BYTES / read)
    machine = {"peak_flops": peaks, "read_bytes_per_s": speeds}
    return [*(results.figure("machine", name, values) for name, values in machine.items()), *rows]


def one_rows(model: Any) -> list[dict[str, str]]:
    """The time of reading all weights and cached keys and values once, over that of a step of one conversation."""
    decoder, width, rows = CachedDecoder(model).decoder, model.config.hidden_size, []
    weights = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    for context in CONTEXTS:
        numbers = weights + context * decoder.block_numbers // CACHE_BLOCK
        x = torch.ones(2 * numbers // 8, dtype=torch.int64)
        drawing, greedy = (make_step(decoder, width, 1, context, 1, temperature) for temperature in (0.8, 0))
        times = in_turn([x.sum, drawing, greedy], 300)
        subject = f"one conversation at {context} tokens"
        rows += [
            results.figure(subject, "read_over_step", statistics.median(read / step for read, step, _ in times)),
            results.figure(subject, "read_over_greedy", statistics.median(read / step for read, _, step in times)),
        ]
    return rows


def adapter_rows(model: Any) -> list[dict[str, str]]:
    """The time of a step with an adapter in use, which is not merged, over that without."""
    adapted = attach_lora(copy.deepcopy(model), lora_config(16, 32, 0.0, None)).eval()
    decoders, width = [CachedDecoder(each).decoder for each in (adapted, model)], model.config.hidden_size
    rows = []
    for conversations in CONVERSATIONS:
        steps = [make_step(each, width, conversations, 128, conversations) for each in decoders]
        pairs = in_turn(steps, max(60, 400 // conversations))
        ratio = statistics.median(with_adapter / without for with_adapter, without in pairs)
        rows.append(results.figure(f"step of {conversations} at 128 tokens", "with_adapter_over_without", ratio))
    return rows


def answer_rate(engine: Engine, conversations: int) -> float:
    """Tokens a second of greedy answers to as many of the demo's prompts."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in demo_data.mine_prompts()[:conversations]]
    started = time.perf_counter()
    answers = engine.answer_many(prompts, Sampling(max_tokens=TOKENS))
    return sum(answer.tokens or 0 for answer in answers if isinstance(answer, Answer)) / (time.perf_counter() - started)


def rate_rows(model: Any, rounds: int) -> list[dict[str, str]]:
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
    return [
        results.figure(f"{engine}, {conversations} conversations", "tokens_per_s", values)
        for engine, by_conversations in found.items()
        for conversations, values in by_conversations.items()
    ]


def decode_all(decoder: CachedDecoder, lengths: Sequence[int], prompt: int = 2) -> tuple[float, float]:
    """Tokens a second of sequences that draw so many tokens, 64 at once, and memory above what there was before."""
    requests = [Request([(i * 31 + j) % 1000 for j in range(prompt)], length) for i, length in enumerate(lengths)]
    batch = BatchDecoder(decoder, end_tokens=set(), context=512, cache_bytes=1 << 28, parallel=64)
    before, started, drawn = psutil.Process().memory_info().rss, time.perf_counter(), 0
    peak = before
    for _ in batch.run(requests):
        drawn += 1
        if drawn % 500 == 0:
            peak = max(peak, psutil.Process().memory_info().rss)
    return drawn / (time.perf_counter() - started), float(peak - before)


def uneven_rows(model: Any, count: int) -> list[dict[str, str]]:
    """The rate of sequences of 1 to 255 tokens beside that of full steps."""
    decoder = CachedDecoder(model)
    steady, _ = decode_all(decoder, [128] * 256)
    uneven, _ = decode_all(decoder, [1 + 37 * i % 255 for i in range(count)])
    figures = {"tokens_per_s": uneven, "steady_tokens_per_s": steady, "uneven_over_steady": uneven / steady}
    return [results.figure(f"{count:,} uneven sequences", name, value) for name, value in figures.items()]


def memory_rows(model: Any) -> list[dict[str, str]]:
    """Memory above the model's, and the rate, of 64 conversations that grow to 512 tokens."""
    rate, memory = decode_all(CachedDecoder(model), [256] * 64, prompt=256)
    figures = {"memory_bytes": memory, "tokens_per_s": rate}
    return [results.figure("64 conversations of 512 tokens", name, value) for name, value in figures.items()]


@torch.no_grad()
def accuracy_rows(model: Any) -> list[dict[str, str]]:
    """Greedy answers beside transformers' own in fp32: log-probabilities of the drawn tokens, and the likeliest."""
    engine = TransformersEngine(model, load_tokenizer(BUNDLED), batch=64)
    prompts = [[{"role": "user", "content": prompt}] for prompt in demo_data.mine_prompts()[:24]]
    exact, rounded = load_base(BUNDLED, torch.float32), load_base(BUNDLED, torch.bfloat16)
    found: list[tuple[torch.Tensor, ...]] = []
    for i, answer in engine.answers(prompts, Sampling(max_tokens=256, logprobs=True)):
        if not isinstance(answer, Answer) or not answer.token_ids or answer.logprobs is None:
            continue
        ids, drawn = engine.prompt_ids(prompts[i]), torch.tensor(answer.token_ids)
        whole = torch.tensor([[*ids, *answer.token_ids]])
        fp32, bf16 = (each(input_ids=whole).logits[0, len(ids) - 1 : -1].float() for each in (exact, rounded))
        expected, theirs = (z.log_softmax(-1).gather(1, drawn.unsqueeze(1))[:, 0] for z in (fp32, bf16))
        likeliest = fp32.argmax(-1)
        found.append(
            (
                torch.tensor(answer.logprobs) - expected,
                theirs - expected,
                likeliest == drawn,
                likeliest == bf16.argmax(-1),
            )
        )
    rows = []
    for first, end in itertools.pairwise((0, 32, 128, 256)):
        ours, theirs, same, theirs_same = (
            torch.cat([each[first:end] for each in column]) for column in zip(*found, strict=True)
        )
        figures = {
            "logprob_rms": ours.square().mean().sqrt(),
            "transformers_bf16_logprob_rms": theirs.square().mean().sqrt(),
            "likeliest_as_fp32": same.float().mean(),
            "transformers_bf16_likeliest_as_fp32": theirs_same.float().mean(),
        }
        subject = f"tokens {first} to {end} of 24 answers"
        rows += [results.figure(subject, name, float(value)) for name, value in figures.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; all if none is named")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=2000, help="of uneven lengths (%(default)s)")
    results.add_arguments(parser, results.processor())
    arguments = parser.parse_args()
    measures: dict[str, Callable[[Any], list[dict[str, str]]]] = {
        "steps": step_rows,
        "one": one_rows,
        "accuracy": accuracy_rows,
        "adapter": adapter_rows,
        "uneven": lambda model: uneven_rows(model, arguments.sequences),
        "memory": memory_rows,
        "rates": lambda model: rate_rows(model, arguments.rounds),
    }
    if unknown := set(arguments.parts) - set(measures):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(measures)}")
    model = load_for_inference(BUNDLED, torch.device("cpu"))
    for name in arguments.parts or measures:
        rows = measures[name](model)
        results.replace(f"decode {name}", rows, arguments.processor, "bfloat16", arguments.output)
        for row in rows:
            print(f"{row['subject']}: {row['figure']} {row['value']}")


if __name__ == "__main__":
    main()
