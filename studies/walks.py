"""Walking: the default `buleyean walk`, on the bundled prompts and on other splits of them.

    python studies/walks.py [--split SEED ...] [--rounds N] -o FOLDER

Split 0 is the bundled one. Of any other, 128 of the prompts that are mined by default, drawn at random with that seed,
are held out, and the rest and the bundled held-out prompts mined: no setting was ever chosen on those 128.
Stopped, the same command goes on; `--table` only draws what there is.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.mining.judges import find_judge
from buleyean_rl.mining.walk import walk, walk_config
from buleyean_rl.mining.walk_report import Round
from buleyean_rl.models.source import BUNDLED
from harness import markdown

SPLITS = (0, 11, 12, 13)


def split(seed: int) -> tuple[list[str], list[str]]:
    """Prompts to mine, and prompts to measure on."""
    mined, unseen = demo_data.mine_prompts(), demo_data.held_out_prompts()
    if not seed:
        return mined, unseen
    drawn = random.Random(seed).sample(mined, len(unseen))
    return [prompt for prompt in (*mined, *unseen) if prompt not in drawn], drawn


def table(folder: Path) -> str:
    """The rounds of the walks that are there."""
    rows = []
    for file in sorted(folder.glob("*/walk.json")):
        rounds = [Round(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["rounds"]]
        for r in rounds:
            made = [f"{r.drift(rounds[0]):+.3f}", str(r.rejected), str(r.records)] if r.round else [""] * 3
            rows.append([file.parent.name, str(r.round), f"{r.loop_rate:.1%}", *made, f"{r.seconds:.0f}"])
    return markdown(("split", "round", "answers that loop", "drift", "newly rejected", "records", "seconds"), rows)


def main() -> None:
    """Walk what is not walked yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=int, nargs="+", default=SPLITS, metavar="SEED")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    for seed in () if arguments.table else arguments.split:
        mined, unseen = split(seed)
        folder = arguments.output / f"split-{seed}"
        walk(
            mined,
            unseen,
            BUNDLED,
            folder,
            [find_judge("loops")],
            walk_config(None, {}),
            rounds=arguments.rounds,
            console=Console(),
        )
    print(table(arguments.output))


if __name__ == "__main__":
    main()
