"""Own loops: the model's looping answers are the rejections; loops on unseen prompts against damage elsewhere.

    python studies/own_loops.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER

The base answers the first 400 prompts (or `--mined` of them), and the last 200 are for measuring; every method trains
on the same looping ones, with the same rejected spans, steps and batches. Stopped, the same command goes on; `--table`
only draws what there is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
from buleyean_rl.data.encode import encode_prompt, encode_response
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import Prompt, RejectionRecord
from buleyean_rl.data.trie import Boundary, build_boundaries, merge_responses
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.evaluation.statistics import wilson
from buleyean_rl.mining.votes import ROUNDS, reject_loops
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from harness import Method, keep

UNSEEN, NEUTRAL = 200, 64
LIMIT, NEAR = 0.02, 0.1  # nats per token of drift: the goal, and what a closer look is taken at
PROMPT_TOKENS = 192  # longer prompts are left out
OURS = {"complement": "black", "ratio alpha0.9": "magenta", "ratio batch2-alpha0.9": "darkviolet"}  # drawn boldly
SMALL = ("per_device_train_batch_size", 2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

METHODS = [
    Method("complement", 5e-4),
    Method("npo", 1e-4),
    Method("unlikelihood", 1e-4),
    Method("ratio", 5e-4, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("kto", 4e-5),
    Method("ratio", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL, ("alpha", 0.9))),
    Method("npo", 3e-5),
    Method("npo", 6e-5),
    Method("complement", 1e-3),
    Method("complement", 1e-3, label="tau2", settings=(("tau", 2.0),)),
    Method("kto", 5e-4),
    Method("complement", 5e-4, 4, label="4epochs"),
    Method("ascent", 2e-5),
    Method("unlikelihood", 3e-5),
    Method("complement", 2e-4),
    Method("kto", 2e-4),
    Method("ascent", 5e-6),
    Method("npo", 3e-4),
    Method("unlikelihood", 3e-4),
    Method("kto", 1e-3),
    Method("published", 5e-4),
    Method("complement", 5e-4, label="tau8", settings=(("tau", 8.0),)),
    Method("complement", 1e-3, label="tau8", settings=(("tau", 8.0),)),
    Method("complement", 1e-3, 4, label="tau8-4epochs", settings=(("tau", 8.0),)),
    Method("complement", 5e-4, 1, label="tau8-anchors", settings=(("tau", 8.0),), anchors=99),
    Method("complement", 5e-4, label="tau8-attention", settings=(("tau", 8.0), ("lora_targets", ATTENTION))),
    Method("complement", 2e-4, label="rejected-alone", rejected_alone=True),
    Method("complement", 5e-4, label="tau3", settings=(("tau", 3.0),)),
    Method("complement", 5e-4, label="alpha0.4", settings=(("alpha", 0.4),)),
    Method("complement", 5e-4, label="alpha0.9", settings=(("alpha", 0.9),)),
]

# Ten times the steps of the table above, beside the same steps: with few records, since it takes so long.
LONG = [
    Method("complement", 5e-4, 20, label="20epochs"),
    Method("complement", 5e-4),
    Method("ratio", 5e-4, 20, label="alpha0.9-20epochs", settings=(("alpha", 0.9),)),
    Method("npo", 1e-4, 20, label="20epochs"),
    Method("ratio", 5e-4, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("npo", 1e-4),
    Method("unlikelihood", 1e-4, 20, label="20epochs"),
    Method("unlikelihood", 1e-4),
]


def pick_prompts(paths: Sequence[Path], mined: int, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """The first prompts of some files, to mine, and the last, to measure on; long ones left out."""
    every = dict.fromkeys(prompt for path in paths for prompt in read_prompts(path))
    short = [prompt for prompt in every if len(encode_prompt(tokenizer, prompt)) <= PROMPT_TOKENS]
    if len(short) < mined + UNSEEN:
        raise SystemExit(f"{len(short)} prompts of at most {PROMPT_TOKENS} tokens: {mined + UNSEEN} are needed")
    return short[:mined], short[-UNSEEN:]


@dataclass(frozen=True)
class Task:
    """What is learnt, and what it is measured on.

    Args:
        folder: where the results are.
        tokenizer: the model's.
        prompts: the mined ones.
        answers: the base's answers to them.
        unseen: prompts to count loops on.
        neutral: texts to measure drift on.
        precision: of the model.
    """

    folder: Path
    tokenizer: Any
    prompts: list[Prompt]
    answers: list[str]
    unseen: list[Prompt]
    neutral: list[Boundary]
    precision: str

    @cached_property
    def records(self) -> list[RejectionRecord]:
        """The looping answers, their repeats rejected."""
        return reject_loops(self.prompts, self.answers)  # type: ignore[arg-type]

    @cached_property
    def rejected(self) -> list[Boundary]:
        """Them, as they are trained on."""
        return self.boundaries(self.records)

    def boundaries(self, records: Sequence[RejectionRecord]) -> list[Boundary]:
        """Records as they are trained on."""
        return [b for b in build_boundaries(records, self.tokenizer, 1024) if b is not None]

    def anchors(self, count: int) -> list[Boundary]:
        """The first answers that do not loop: nothing of them is rejected, so the base is the target everywhere."""
        good = [pair for pair in zip(self.prompts, self.answers, strict=True) if not is_looping(pair[1])][:count]
        return [
            merge_responses(encode_prompt(self.tokenizer, prompt), [encode_response(self.tokenizer, text)], [0], ROUNDS)
            for prompt, text in good
        ]

    def run(self, method: Method, boundaries: Sequence[Boundary], **how: Any) -> None:
        """Train and measure, if it was not done before."""

        def work() -> dict[str, Any]:
            model, log = harness.train(replace(method, precision=self.precision), boundaries, **how)
            return log | self.measure(model, method.run)

        keep(self.folder, method.run, work)

    def measure(self, model: Any, run: str) -> dict[str, Any]:
        """Loops, drift, and what was rejected."""
        texts = self.folder / "answers" / f"{run}.json"
        return harness.measure(model, self.tokenizer, self.unseen, self.neutral, self.rejected, texts)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a study of own loops."""
    found = harness.arguments_of(description)
    found.add_argument("--prompts", type=Path, nargs="+", required="--table" not in sys.argv)
    found.add_argument("--mined", type=int, default=400, help="prompts whose answers are mined")
    return found


def prepare(arguments: argparse.Namespace) -> Task:
    """Mine, and measure the base, if it was not done before."""
    folder: Path = arguments.output
    harness.keep_to(arguments.precision, folder)
    tokenizer = load_tokenizer(BUNDLED)
    prompts, unseen = pick_prompts(arguments.prompts, arguments.mined, tokenizer)
    neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
    base = harness.base(arguments.precision)
    mined = keep(
        folder / "answers", "mined", lambda: {"texts": [a.text for a in harness.answer(base, tokenizer, prompts)]}
    )
    task = Task(folder, tokenizer, prompts, mined["texts"], unseen, neutral, arguments.precision)
    print(f"{len(task.rejected)} of {len(prompts)} mined answers loop", file=sys.stderr, flush=True)
    if not task.rejected:
        raise SystemExit("nothing to train on")
    keep(folder, "base", lambda: {"precision": task.precision} | task.measure(base, "base"))
    return task


def main() -> None:
    """Run what is not done yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--long", action="store_true", help="ten times the epochs, beside as many as else")
    arguments = options.parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for method in LONG if arguments.long else METHODS:
            task.run(method, [*task.rejected, *task.anchors(method.anchors)])
    print(table(arguments.output))
    runs = harness.read_runs(arguments.output)
    plot(arguments.output / "pareto.png", runs.pop("base"), runs)


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown."""
    runs = harness.read_runs(folder)
    base = runs.pop("base")
    columns = "run", "loops, unseen prompts", "neutral drift", "rejected text", "characters", "ends by itself"
    rows = []
    for name, run in {"base": base, **runs}.items():
        interval = wilson(sum(run["loops"]), len(run["loops"]))
        assert interval is not None
        cells = (
            name.removesuffix("-seed42"),
            f"{run['loop_rate']:.1%} ({interval.low:.0%} to {interval.high:.0%})",
            f"{run['neutral_nll'] - base['neutral_nll']:+.3f}" if run is not base else "",
            f"{run['rejected_nll']:.2f}",
            f"{run['mean_characters']:.0f}",
            f"{run['ended_share']:.0%}",
        )
        rows.append(cells)
    return harness.markdown(columns, rows)


def plot(path: Path, base: dict[str, Any], runs: dict[str, Any]) -> None:
    """Loops against drift, one line a method: all of them, and those that hardly drift."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    near, far = figure.subplots(1, 2, sharey=True)
    by_method: dict[str, list[tuple[float, float, float]]] = {}
    for run in sorted(runs.values(), key=lambda run: run["method"]["learning_rate"]):
        label = " ".join(filter(None, (run["method"]["name"], run["method"]["label"])))
        drift = run["neutral_nll"] - base["neutral_nll"]
        by_method.setdefault(label, []).append((drift, run["loop_rate"], run["method"]["learning_rate"]))
    for axes in (near, far):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
        axes.scatter([0], [base["loop_rate"]], marker="*", s=160, color="0.2", label="base", zorder=3)
        for label, points in sorted(by_method.items()):
            drifts, loops, _ = zip(*points, strict=True)
            width, size = (3.0, 9.0) if label in OURS else (1.2, 6.0)
            axes.plot(drifts, loops, "o-", label=label, color=OURS.get(label), linewidth=width, markersize=size)
        axes.axvline(LIMIT, color="0.6", linestyle=":")
        axes.axhline(base["loop_rate"] / 5, color="0.6", linestyle=":")
    for points in by_method.values():
        for drift, loops, rate in points:
            if drift < NEAR:
                near.annotate(f"{rate:g}", (drift, loops), textcoords="offset points", xytext=(5, 5), fontsize=7)
    near.set_xlim(-NEAR / 10, NEAR)
    near.set_ylabel("share of answers that loop, unseen prompts")
    far.set_xscale("symlog", linthresh=NEAR)
    far.set_xlim(left=-NEAR / 10)
    far.legend(frameon=False)
    figure.supxlabel("drift of neutral text, nats per token; beside the points their learning rates", fontsize="medium")
    figure.savefig(path)


if __name__ == "__main__":
    main()
