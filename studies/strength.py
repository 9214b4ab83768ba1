"""How hard to push: adapters trained once, applied at several strengths, on the task of `own_loops.py`.

    python studies/strength.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER

At strength 1 an adapter is what was trained, at 2 its change to every weight is twice that. The baselines are
strengthened too: what this buys must not be taken for the objective's merit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from buleyean_rl.models.lora import scale_adapter
from harness import Method, keep
from own_loops import LIMIT, SMALL, Task, parser, prepare, table

STRENGTHS = (1.0, 1.25, 1.4, 1.5, 1.7)
METHODS = [
    Method("complement", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL, ("alpha", 0.9))),
    Method("complement", 7e-4, 4, label="batch2", settings=(SMALL,)),
    Method("complement", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL, ("alpha", 0.9)), seed=43),
    Method("ratio", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL, ("alpha", 0.9))),
    Method("ratio", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL, ("alpha", 0.9)), seed=43),
    Method("ratio", 7e-4, 4, label="batch2", settings=(SMALL,)),
    Method("npo", 4e-5, 4, label="batch2", settings=(SMALL,)),
    Method("npo", 6e-5),
    Method("complement", 5e-4),
]


def run_name(method: Method, strength: float) -> str:
    """The name of a method's figures at a strength."""
    return f"{method.run}-x{strength:g}"


def run(task: Task, method: Method) -> None:
    """Train once, if any strength is missing, and measure at each."""
    if all((task.folder / f"{run_name(method, strength)}.json").exists() for strength in STRENGTHS):
        return
    model, log = harness.train(replace(method, precision=task.precision), task.rejected)
    now = 1.0
    for strength in STRENGTHS:
        scale_adapter(model, strength / now)
        now = strength

        def work(strength: float = strength) -> dict[str, Any]:
            return log | {"strength": strength} | task.measure(model, run_name(method, strength))

        keep(task.folder, run_name(method, strength), work)


def main() -> None:
    """Run what is not done yet, and print the table."""
    arguments = parser(__doc__).parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for method in METHODS:
            run(task, method)
    print(table(arguments.output))
    plot(arguments.output)


def plot(folder: Path) -> None:
    """Loops against drift, a line for each adapter, from strength 1 on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    runs = harness.read_runs(folder)
    base = runs.pop("base")
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        lines.setdefault(name.rsplit("-x", 1)[0], []).append(run)
    for name, points in sorted(lines.items()):
        points.sort(key=lambda run: run["strength"])
        drifts = [run["neutral_nll"] - base["neutral_nll"] for run in points]
        axes.plot(drifts, [run["loop_rate"] for run in points], "o-", label=name)
        for drift, run in zip(drifts, points, strict=True):
            place = drift, run["loop_rate"]
            axes.annotate(f"{run['strength']:g}", place, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.axvline(LIMIT, color="0.6", linestyle=":")
    axes.axhline(base["loop_rate"] / 5, color="0.6", linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("drift of neutral text, nats per token; beside the points the strength")
    axes.set_ylabel("share of answers that loop, unseen prompts")
    axes.legend(frameon=False)
    figure.savefig(folder / "strength.png")


if __name__ == "__main__":
    main()
