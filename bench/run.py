"""Ours and its peers, alternately, on the same records: `bench/results.json` and `bench/results.md`.

    python bench/run.py [--pairs PAIRS.jsonl] [--rounds 2] [--steps 5]

Each contestant runs in a process of its own, one after the other, and the round is repeated: medians over the rounds,
and ratios within them, survive a machine whose speed drifts. Besides, in this process: the machine's bf16 peak, what
the loss costs over its bare matrix products and in memory, and what a shared prompt saves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from buleyean_rl import demo_data
from buleyean_rl.boundary import build_boundaries, merge_responses
from buleyean_rl.complement import Counts
from buleyean_rl.fused import OutputHead, fused_loss
from buleyean_rl.lora import lora_config
from buleyean_rl.losses import Objective
from buleyean_rl.models import BUNDLED, attach_lora, load_base, output_head
from buleyean_rl.report import library_versions
from buleyean_rl.trainer import batch_losses, choose_layout

HERE = Path(__file__).parent
CONTESTANTS = ("complement", "published", "plain", "trl_kto", "trl_dpo", "trl_sft")
COLUMNS = ("prompt", "chosen", "rejected")
POSITIONS, VOCABULARY, WIDTH = 2048, 49152, 576


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


def contest(pairs: Path, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            command = [sys.executable, str(HERE / "contestant.py"), name, str(pairs), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr)
    return results


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_flops() -> float:
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / seconds(lambda: a @ a, 9)


def loss_cost() -> dict[str, float]:
    """The complement loss on 2048 positions: its time over its three bare products, and its extra memory."""
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.bfloat16)
    reference = hidden + torch.randn_like(hidden) / 8
    node = torch.arange(POSITIONS)
    token = torch.randint(0, VOCABULARY, (POSITIONS,))
    counts = Counts(node, token, torch.full((POSITIONS,), 10.0), torch.full((POSITIONS,), 10.0))
    head = OutputHead(weight)

    def loss() -> None:
        h = hidden.clone().requires_grad_()
        fused_loss(h, head, counts, Objective(), reference).loss.sum().backward()

    loss()
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    import threading

    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.001):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loss()
    stop.set()
    watcher.join()
    logits = torch.empty(POSITIONS, VOCABULARY, dtype=torch.bfloat16)

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(reference, weight.T, out=logits)
        torch.mm(logits, weight)

    return {"loss_over_matmul": seconds(loss, 3) / seconds(products, 3), "loss_extra_bytes": max(most - before, 0)}


def trie_ratio() -> float:
    """A 256-token prompt with four 128-token answers as one trie, over the same as four sequences."""
    torch.manual_seed(0)
    model = attach_lora(load_base(BUNDLED, torch.bfloat16), lora_config(16, 32, 0.0, None))
    layout, head = choose_layout(model), output_head(model)
    prompt = torch.randint(5, 40000, (256,)).tolist()
    answers = [(torch.randint(5, 40000, (128,)).tolist(), [True] * 128) for _ in range(4)]
    together = layout([merge_responses(prompt, answers, [1] * 4, 4)])
    apart = layout([merge_responses(prompt, [answer], [1], 4) for answer in answers])

    def step(batch: Any) -> None:
        batch_losses(model, head, batch, Objective()).loss.mean().backward()
        model.zero_grad()

    return seconds(lambda: step(together), 3) / seconds(lambda: step(apart), 3)


def step_flops(pairs: list[dict[str, str]]) -> float:
    """Arithmetic a record costs at least, two operations for a multiply and an add.

    Per token, the linear layers three times (model, reference, gradient in the input) and the adapter three times; per
    node, three products with the output head; attention's causal half four times (twice forward, twice's worth back).
    """
    from buleyean_rl.models import load_tokenizer
    from buleyean_rl.records import make_record

    records = [make_record(pair["prompt"], [pair["rejected"]], [1], 1) for pair in pairs]
    boundaries = [boundary for boundary in build_boundaries(records, load_tokenizer(BUNDLED), 512) if boundary]
    linear, adapter, head, layers = 106_168_320, 4_884_480, VOCABULARY * WIDTH, 30
    total = 0.0
    for boundary in boundaries:
        tokens = len(boundary.prompt) + len(boundary.tokens)
        attention = layers * 2 * tokens**2 * WIDTH  # scores and values, the causal half
        total += tokens * (3 * 2 * linear + 3 * 2 * adapter) + boundary.nodes * 3 * 2 * head + 4 * attention
    return total / len(boundaries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSONL with prompt, chosen and rejected; bundled texts if absent")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    pairs = (read_pairs(arguments.pairs) if arguments.pairs else bundled_pairs())[: arguments.steps * 4]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        runs = contest(path, arguments.rounds, arguments.steps)
    medians = {name: statistics.median(run["records_per_s"] for run in done) for name, done in runs.items()}
    peak, flops = peak_flops(), step_flops(pairs)
    result: dict[str, Any] = {f"{name}_records_per_s": value for name, value in medians.items()}
    result |= {
        "peak_flops": peak,
        "peak_share": medians["complement"] * flops / peak,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs["complement"]),
        **loss_cost(),
        "trie_ratio": trie_ratio(),
        "runs": runs,
        "versions": library_versions(),
        "command": "python " + " ".join(sys.argv),
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (HERE / "results.md").write_text(table(result, runs), encoding="utf-8")


def table(result: dict[str, Any], runs: dict[str, list[dict[str, float]]]) -> str:
    rows = ["| contestant | records/s, median | least - most | peak memory |", "|---|---|---|---|"]
    for name, done in runs.items():
        speeds = sorted(run["records_per_s"] for run in done)
        median = statistics.median(speeds)
        memory = max(run["peak_rss_bytes"] for run in done) / 1e9
        rows.append(f"| {name} | {median:.2f} | {speeds[0]:.2f} - {speeds[-1]:.2f} | {memory:.1f} GB |")
    figures = ("peak_flops", "peak_share", "loss_over_matmul", "loss_extra_bytes", "trie_ratio")
    rows += ["", "| figure | |", "|---|---|", *(f"| {name} | {result[name]:.4g} |" for name in figures)]
    return "\n".join([f"`{result['command']}`", "", *rows, ""])


if __name__ == "__main__":
    main()
