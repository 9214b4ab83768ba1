"""Own loops: the model's looping answers are the rejections; loops on unseen prompts against damage elsewhere.

    python studies/own_loops.py --prompts P.jsonl --unseen U.jsonl --neutral N.jsonl -o FOLDER

400 answers of the base are mined; every method trains on the same looping ones, with the same rejected spans, steps and
batches. Stopped, the same command goes on; `--table` only draws what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import harness
from buleyean_rl.boundary import build_boundaries, encode_prompt
from buleyean_rl.mine import read_prompts, reject_loops
from buleyean_rl.models import BUNDLED, default_dtype, load_base, load_tokenizer
from buleyean_rl.records import Prompt
from harness import Method, keep

MINED, UNSEEN, NEUTRAL = 400, 200, 64
PROMPT_TOKENS = 192  # longer prompts are left out

METHODS = [
    Method("complement", 5e-4),
    Method("npo", 1e-4),
    Method("unlikelihood", 1e-4),
    Method("kto", 5e-4),
    Method("ascent", 2e-5),
    Method("complement", 1e-3),
    Method("npo", 3e-5),
    Method("unlikelihood", 3e-5),
    Method("kto", 2e-4),
    Method("ascent", 5e-6),
    Method("complement", 2e-4),
    Method("npo", 3e-4),
    Method("unlikelihood", 3e-4),
    Method("kto", 1e-3),
    Method("complement", 5e-4, label="alpha0.5", settings=(("alpha", 0.5),)),
    Method("complement", 5e-4, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("published", 5e-4),
]


def pick_prompts(path: Path, tokenizer: Any, count: int) -> list[Prompt]:
    """The first prompts of a file that are not too long."""
    short = (prompt for prompt in read_prompts(path) if len(encode_prompt(tokenizer, prompt)) <= PROMPT_TOKENS)
    return [prompt for prompt, _ in zip(short, range(count), strict=False)]


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "unseen", "neutral"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not arguments.table:
        tokenizer = load_tokenizer(BUNDLED)
        unseen = pick_prompts(arguments.unseen, tokenizer, UNSEEN)
        prompts = [p for p in pick_prompts(arguments.prompts, tokenizer, MINED + UNSEEN) if p not in set(unseen)][
            :MINED
        ]
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
        base = load_base(BUNDLED, default_dtype("cpu"))
        mined = keep(folder, "mined", lambda: {"answers": harness.answer(base, tokenizer, prompts)})["answers"]
        records = reject_loops(prompts, mined)  # type: ignore[arg-type]
        boundaries = [b for b in build_boundaries(records, tokenizer, 1024) if b is not None]
        print(f"{len(boundaries)} of {len(prompts)} mined answers loop", file=sys.stderr, flush=True)
        keep(folder, "base", lambda: harness.measure(base, tokenizer, unseen, neutral, boundaries))
        del base
        for method in METHODS:

            def run(method: Method = method) -> dict[str, Any]:
                model, log = harness.train(BUNDLED, method, boundaries)
                return log | harness.measure(model, tokenizer, unseen, neutral, boundaries)

            keep(folder, method.run, run)
    print(table(folder))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown; draws them too."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "mined"}
    base = runs.pop("base")
    rows = [
        "| run | loops, unseen prompts | neutral drift, nats/token | rejected text, nats/token |",
        "|---|---|---|---|",
    ]
    rows.append(f"| base | {base['loop_rate']:.1%} | | {base['rejected_nll']:.2f} |")
    for name, run in runs.items():
        drift = run["neutral_nll"] - base["neutral_nll"]
        rows.append(f"| {name} | {run['loop_rate']:.1%} | {drift:+.3f} | {run['rejected_nll']:.2f} |")
    plot(folder / "pareto.png", base, runs)
    return "\n".join(rows)


def plot(path: Path, base: dict[str, Any], runs: dict[str, Any]) -> None:
    """Loops against drift, one line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.scatter([0], [base["loop_rate"]], marker="*", s=160, color="0.2", label="base")
    by_method: dict[str, list[tuple[float, float, str]]] = {}
    for run in runs.values():
        label = " ".join(filter(None, (run["method"]["name"], run["method"]["label"])))
        point = (run["neutral_nll"] - base["neutral_nll"], run["loop_rate"], f"{run['method']['learning_rate']:g}")
        by_method.setdefault(label, []).append(point)
    for label, points in by_method.items():
        points.sort()
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=label)
        for x, y, note in points:
            axes.annotate(note, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.axvline(0.02, color="0.6", linestyle=":")
    axes.axhline(base["loop_rate"] / 5, color="0.6", linestyle=":")
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set_xlabel("drift of neutral text, nats per token")
    axes.set_ylabel("share of answers that loop, unseen prompts")
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
