"""Ours and its peers, alternately, on the same records; writes this processor's rows of `bench/results.csv`.

    python bench/run.py [--pairs PAIRS.jsonl] [--rounds 2] [--steps 5]

Each contestant runs in a process of its own, one after the other, and the round is repeated: medians over the rounds,
and ratios within them, survive a machine whose speed drifts. Besides, in this process: the machine's peak, what
the loss costs over its bare matrix products and in memory, and what a shared prompt saves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import results
from buleyean_rl import demo_data
from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.batching.micro_batch import bin_pack, micro_batch_tokens
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import make_record
from buleyean_rl.data.trie import Boundary, build_boundaries, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head
from buleyean_rl.models.weights import load_tokenizer
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import fused_loss
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.system.environment import DEFAULTS
from buleyean_rl.system.memory import return_free_memory
from contestant import BATCH, CPU, MAX_LENGTH, PRECISION

HERE = Path(__file__).parent
PEERS = ("trl_kto", "plain", "trl_sft", "trl_dpo")
CONTESTANTS = ("complement", "base_bits_4", "trl_kto", "long_rows", "plain", "trl_sft", "trl_dpo", "published")
COLUMNS = ("prompt", "chosen", "rejected")
POSITIONS, VOCABULARY, WIDTH = 2048, 49152, 576

# In a small process of its own: to the system a child has held at least what its parent held when it was started.
MEASURED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"import_seconds": seconds, "import_rss_bytes": peak}))
"""


def bundled_pairs() -> list[dict[str, str]]:
    """Pairs of about 240 tokens made of the demo's prompts and neutral texts."""
    texts = itertools.cycle(demo_data.neutral_texts())
    return [
        {"prompt": prompt, "rejected": " ".join(next(texts) for _ in range(3)), "chosen": next(texts)}
        for prompt in demo_data.mine_prompts()
    ]


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs of single-turn prompts; where there are messages, the last one's text."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        {key: row[key] if isinstance(row[key], str) else row[key][-1]["content"] for key in COLUMNS} for row in rows
    ]
    return [pair for pair in pairs if all(pair.values())]


def fitting(pairs: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The first pairs whose prompt leaves room for an answer, so that a step is as many records for everybody."""
    records = [make_record(pair["prompt"], [pair["rejected"]], [1], 1) for pair in pairs]
    boundaries = build_boundaries(records, Encoder(load_tokenizer(BUNDLED), MAX_LENGTH))
    return list(itertools.islice((pair for pair, boundary in zip(pairs, boundaries, strict=True) if boundary), count))


def run(name: str, pairs: Path, steps: int) -> dict[str, float]:
    """One contestant. Ours has the environment that the command gives it, peers have their users'."""
    theirs = {key: value for key, value in os.environ.items() if key not in DEFAULTS}
    environment = theirs if name in PEERS else dict(os.environ)
    command = [sys.executable, str(HERE / "contestant.py"), name, str(pairs), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, result, file=sys.stderr)
    return result


def contest(pairs: Path, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Each round runs every contestant once, and measures the machine's peak before and after ours."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            before = peak_flops()
            runs[name].append(run(name, pairs, steps))
            runs[name][-1]["peak_flops"] = (before + peak_flops()) / 2
    return runs


def seconds(work: Callable[[], Any], repeats: int = 5, warm: bool = True) -> float:
    if warm:
        work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def ratio(work: Callable[[], Any], other: Callable[[], Any], repeats: int = 5) -> float:
    """Time of one over time of the other, in turn."""
    work()
    other()
    return statistics.median(seconds(work, 1, warm=False) / seconds(other, 1, warm=False) for _ in range(repeats))


def peak_flops() -> float:
    a = torch.randn(2048, 2048, dtype=PRECISION)
    return 2 * 2048**3 / seconds(lambda: a @ a, 9)


def importing(rows: int = 1_000_000) -> dict[str, float]:
    """Seconds and memory of `buleyean data import` on a file of that many pairs."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "pairs.jsonl", Path(folder) / "records.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for i in range(rows):
                answers = {"chosen": f"Yes: {i * i}. {'word ' * 20}", "rejected": f"No: {i + i}. {'other ' * 20}"}
                file.write(json.dumps({"prompt": f"What is {i} times {i}?", **answers}) + "\n")
        command = [str(Path(sys.executable).with_name("buleyean")), "data", "import", str(source), "-o", str(target)]
        done = subprocess.run([sys.executable, "-c", MEASURED, *command], check=True, capture_output=True, text=True)
        lines = sum(1 for _ in target.open(encoding="utf-8"))
    assert lines == rows
    result: dict[str, float] = json.loads(done.stdout)
    return result


def loss_cost(dtype: torch.dtype) -> dict[str, float]:
    """The complement loss on 2048 positions: its time over its three bare products in torch, and its extra memory."""
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).to(dtype)
    hidden = torch.randn(POSITIONS, WIDTH).to(dtype)
    reference = hidden + torch.randn_like(hidden) / 8
    node = torch.arange(POSITIONS)
    token = torch.randint(0, VOCABULARY, (POSITIONS,))
    counts = Counts(node, token, torch.full((POSITIONS,), 10.0), torch.full((POSITIONS,), 10.0), POSITIONS)
    head = OutputHead(weight)

    hidden.requires_grad_()

    def loss() -> None:
        hidden.grad = None
        fused_loss(hidden, head, counts, Objective(min_p=0.0), reference).loss.sum().backward()

    loss()
    hidden.grad = None
    return_free_memory()  # so goes back, so that taking it again is seen
    process = psutil.Process()
    before, peak = process.memory_info().rss, 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loss()
    stop.set()
    watcher.join()
    logits = torch.empty(POSITIONS, VOCABULARY, dtype=PRECISION)
    x, x_ref, w = (tensor.detach().to(PRECISION) for tensor in (hidden, reference, weight))

    @torch.no_grad()
    def products() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(x_ref, w.T, out=logits)
        torch.mm(logits, w)

    return {"loss_over_matmul": ratio(loss, products), "loss_extra_bytes": max(peak - before, 0)}


def trie_ratio(model: Any) -> float:
    """A 256-token prompt with four 128-token answers as one trie, over four sequences, each in a trainer's rows."""
    torch.manual_seed(0)
    layout, head = LAYOUTS[probe_layout(model)], output_head(model)
    prompt = torch.randint(5, 40000, (256,)).tolist()
    answers = [(torch.randint(5, 40000, (128,)).tolist(), [True] * 128) for _ in range(4)]
    together = [merge_responses(prompt, answers, [1] * 4, [4] * 4)]
    apart = [merge_responses(prompt, [answer], [1], [4]) for answer in answers]

    def step(boundaries: Sequence[Boundary]) -> None:
        rows = bin_pack(boundaries, lambda boundary: boundary.size, micro_batch_tokens(model))
        for batch in add_references(model, [layout(row) for row in rows]):
            batch_losses(model, head, batch, Objective()).loss.mean().backward()
        model.zero_grad()

    return ratio(lambda: step(together), lambda: step(apart))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSONL with prompt, chosen and rejected; bundled texts if absent")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    results.add_arguments(parser, results.processor())
    arguments = parser.parse_args()
    pairs = fitting(read_pairs(arguments.pairs) if arguments.pairs else bundled_pairs(), arguments.steps * BATCH)
    imported = importing()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        runs = contest(path, arguments.rounds, arguments.steps)
        full = [run("full", path, 2) for _ in range(arguments.rounds)]
        epochs = [run("epochs", path, arguments.steps) for _ in range(arguments.rounds)]
    model = attach_lora(load_for_inference(BUNDLED, CPU), lora_config(16, 32, 0.0, None))
    rows = []
    for name, rounds in runs.items():
        rows.append(results.figure(name, "records_per_s", column(rounds, "records_per_s")))
        rows.append(results.figure(name, "peak_rss_bytes", column(rounds, "peak_rss_bytes"), largest=True))
    ours, kto = runs["complement"], runs["trl_kto"]
    speedups = [mine["records_per_s"] / theirs["records_per_s"] for mine, theirs in zip(ours, kto, strict=True)]
    rows += [
        results.figure("complement", "over_trl_kto", speedups),
        results.figure("complement", "peak_share", [run["flops_per_s"] / run["peak_flops"] for run in ours]),
        results.figure("machine", "peak_flops", column(ours, "peak_flops")),
        results.figure("records of 512 tokens", "peak_rss_bytes", column(full, "peak_rss_bytes"), largest=True),
        results.figure("second epoch", "over_first", column(epochs, "ratio")),
        results.figure("trie of four answers", "over_four_sequences", trie_ratio(model)),
        *(results.figure("loss", name, value) for name, value in loss_cost(model.dtype).items()),
        *(results.figure("a million pairs", name, value) for name, value in imported.items()),
    ]
    precisions = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (model.dtype, PRECISION))
    results.replace("run", rows, arguments.processor, ", peers in ".join(precisions), arguments.output)
    own = [row for row in results.read(arguments.output) if row["processor"] == arguments.processor]
    print(results.markdown([row for row in own if row["benchmark"] == "run"]))


def column(runs: Sequence[dict[str, float]], name: str) -> list[float]:
    return [run[name] for run in runs]


if __name__ == "__main__":
    main()
