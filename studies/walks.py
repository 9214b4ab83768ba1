"""Walking: the default `buleyean walk`, on the bundled prompts and on other splits of them.

    python studies/walks.py [--split SEED ...] [--rounds N] -o FOLDER

Split 0 is the bundled one. Of any other, 128 of the prompts that are mined by default, drawn at random with that seed,
are held out, and the rest and the bundled held-out prompts mined: no setting was ever chosen on those 128. The walks
themselves lie in the folder `cache`. Stopped, the same command goes on; `--table` only shows what there is.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.evaluation import drift
from buleyean_rl.mining.judges import find_judge
from buleyean_rl.mining.walk import walk, walk_config
from buleyean_rl.mining.walk_report import Round
from buleyean_rl.models.source import BUNDLED
from harness import Summary, markdown, signed

SPLITS = (0, 11, 12, 13)


def split(seed: int) -> tuple[list[str], list[str]]:
    """Prompts to mine, and prompts to measure on."""
    mined, unseen = demo_data.mine_prompts(), demo_data.held_out_prompts()
    if not seed:
        return mined, unseen
    drawn = random.Random(seed).sample(mined, len(unseen))
    return [prompt for prompt in (*mined, *unseen) if prompt not in drawn], drawn


def add_rounds(summary: Summary, seed: int, report: dict[str, Any]) -> None:
    """Write the rounds of a walk, as its `walk.json` has them."""
    rounds = [Round.from_json(entry) for entry in report["rounds"]]
    for r in rounds:
        bundled = r.drift[drift.BUNDLED]
        trained = {**report["training"], "neutral_drift": bundled.nll - bundled.nll_base} if r.round else {}
        measured = {
            "split": seed,
            "round": r.round,
            "prompts_mined": report["prompts"],
            "prompts": report["held_out"],
            "loop_rate": r.loop_rate,
            "rejection_rate": r.rejection_rate,
            "neutral_nll": bundled.nll,
            "own_kl": r.drift[drift.OWN].kl,
            "neutral_kl": bundled.kl,
            "rejected": r.rejected,
            "records": r.records,
            "seconds": round(r.seconds, 1),
        }
        summary.add(f"split-{seed}-round-{r.round}", measured | trained)


def table(summary: Summary) -> str:
    """The rounds of the walks that are there."""
    rows = []
    for row in summary.rows.values():
        cells = [signed(row, "neutral_drift"), str(row["rejected"]), str(row["records"])] if row["round"] else [""] * 3
        rows.append([f"{row['split']}", f"{row['round']}", f"{row['loop_rate']:.1%}", *cells, f"{row['seconds']:.0f}"])
    return markdown(("split", "round", "answers that loop", "drift", "newly rejected", "records", "seconds"), rows)


def main() -> None:
    """Walk what is not walked yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=int, nargs="+", default=SPLITS, metavar="SEED")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    for seed in () if arguments.table else arguments.split:
        mined, unseen = split(seed)
        folder = arguments.output / "cache" / f"split-{seed}"
        walk(
            mined,
            unseen,
            BUNDLED,
            folder,
            [find_judge("loops")],
            walk_config(None, {"adapter_scale": 1.7}),  # the scale that these walks were measured at
            rounds=arguments.rounds,
            console=Console(),
        )
        add_rounds(summary, seed, json.loads((folder / "walk.json").read_text(encoding="utf-8")))
    print(table(summary))


if __name__ == "__main__":
    main()
