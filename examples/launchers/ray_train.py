"""Train with Ray Train: Ray starts the processes, on one machine or a cluster, and `train` finds the others.

    pip install '.[ray]'    # in the clone
    python ray_train.py records.jsonl --model smollm2-135m -o /shared/run --workers 2

Give absolute paths that every machine can read; the first worker writes the run folder. Run again with --resume, it
goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(job: dict[str, Any]) -> None:
    """What each worker does; Ray has set its rank and where the first one is."""
    from buleyean_rl import train
    from buleyean_rl.training.config import load_config

    config = load_config(None, Path(job["output"]), job["settings"])
    train(job["records"], job["model"], config, resume=job["resume"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records")
    parser.add_argument("--model", required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    settings = {} if options.max_steps is None else {"max_steps": options.max_steps}
    job = {name: getattr(options, name) for name in ("records", "model", "output", "resume")}
    scaling = ScalingConfig(num_workers=options.workers, use_gpu=options.gpu)
    storage = RunConfig(storage_path=str(Path(options.output).resolve().with_name("ray")))  # Ray's own files
    TorchTrainer(work, train_loop_config=job | {"settings": settings}, scaling_config=scaling, run_config=storage).fit()


if __name__ == "__main__":
    main()
