"""Tokens a second of training in several processes of one thread each, beside one process with as many threads.

    python bench/processes.py --processes 2 --steps 6

The bundled model, records of very unequal length, the trainer's own steps; the first is not counted. Both train on the
same steps. Prints the figures, writes no table.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile

RECORDS, LENGTHS = 96, (24, 48, 96, 192, 384)


def start(processes: int, threads: int, steps: int, records: int) -> float:
    """Tokens a second of so many processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    started = []
    for rank in range(processes):
        words = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        words |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        environment = os.environ | {name: str(value) for name, value in words.items()}
        command = [sys.executable, __file__, "--worker", "--steps", str(steps), "--records", str(records // processes)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    printed = [process.communicate()[0] for process in started]
    return float(json.loads(printed[0].splitlines()[-1]))


def work(steps: int, records: int) -> None:
    """One of the processes."""
    import torch

    from buleyean_rl.data.trie import merge_responses
    from buleyean_rl.models.lora import lora_config
    from buleyean_rl.models.model import open_model
    from buleyean_rl.models.source import BUNDLED
    from buleyean_rl.training.config import BuleyeanConfig
    from buleyean_rl.training.processes import join
    from buleyean_rl.training.trainer import BuleyeanTrainer

    def record(number: int) -> object:
        length = LENGTHS[number % len(LENGTHS)]
        ids = torch.randint(5, 40_000, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        return merge_responses(ids[: length // 2], [(ids[length // 2 :], [True] * (length - length // 2))], [10], [10])

    with join() as processes, tempfile.TemporaryDirectory() as folder:
        model = open_model(BUNDLED)
        model.attach_adapter(lora_config(16, 32, 0.0, None))
        config = BuleyeanConfig(
            folder, max_steps=steps, per_device_train_batch_size=records, save_strategy="no", guard=False, tau=1.0
        )
        trainer = BuleyeanTrainer(model, config, [record(number) for number in range(RECORDS)])
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "floor" in entry][1:]
        if processes.is_first:
            print(sum(entry["tokens"] for entry in log) / sum(entry["seconds"] for entry in log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--records", type=int, default=8, help="of a step, in all processes together")
    parser.add_argument("--only", type=int, help="this number of processes alone, with the threads left")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.steps, options.records)
    for processes in (1, options.processes) if options.only is None else (options.only,):
        threads = options.processes // processes
        figure = start(processes, threads, options.steps, options.records)
        print(f"{processes} processes of {threads} threads: {figure:.1f} tokens/s", flush=True)
    return None


if __name__ == "__main__":
    main()
