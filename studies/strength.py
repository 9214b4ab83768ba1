"""How hard to push: adapters trained once, applied at several strengths, on the task of `own_loops.py`.

    python studies/strength.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER

At strength 1 an adapter is what was trained, at 2 its change to every weight is twice that. The baselines are
strengthened too: what this buys must not be taken for the objective's merit.
"""

from __future__ import annotations

from dataclasses import replace

import harness
from buleyean_rl.models.lora import scale_adapter
from harness import Method, Row
from own_loops import SMALL_BATCH, Task, parser, prepare, table

STRENGTHS = (1.0, 1.25, 1.4, 1.5, 1.7)
METHODS = [
    Method("complement", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL_BATCH,)),
    Method("complement", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL_BATCH,), seed=43),
    Method("complement", 7e-4, 4, label="batch2", settings=(SMALL_BATCH, ("alpha", 0.7))),
    Method("npo", 4e-5, 4, label="batch2", settings=(SMALL_BATCH,)),
    Method("npo", 6e-5),
]


def run_name(method: Method, strength: float) -> str:
    """The name of a method's run at a strength."""
    return f"{method.run}-x{strength:g}"


REFERENCE = run_name(METHODS[0], 1)  # what the others are compared with, prompt by prompt


def run(task: Task, method: Method) -> None:
    """Train once, if any strength is missing, and measure at each."""
    if all(run_name(method, strength) in task.summary.rows for strength in STRENGTHS):
        return
    model, columns = harness.train(replace(method, precision=task.precision), task.rejected)
    applied = 1.0
    for strength in STRENGTHS:
        scale_adapter(model, strength / applied)
        applied = strength

        def work(strength: float = strength) -> Row:
            return columns | {"strength": strength} | task.measure(model, run_name(method, strength))

        task.summary.run(run_name(method, strength), work)


def main() -> None:
    """Run what is not done yet, and print the table."""
    arguments = parser(__doc__).parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for method in METHODS:
            run(task, method)
        for name in task.summary.runs:
            harness.compare_loops(task.summary, name, REFERENCE)
        for stem, seeds in harness.alike(task.summary.runs, "-seed[0-9]+").items():
            harness.pool_loops(task.summary, f"{stem} ({len(seeds)} seeds)", seeds)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
