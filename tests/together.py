"""Processes that train together, forked from one that has loaded torch: loading it takes longer than what they do.

`python together.py FUNCTION SIZES FOLDER [ARGUMENTS]`, SIZES such as 1,2,3: for each, so many processes call
`FUNCTION(FOLDER / "of-SIZE", ARGUMENTS)` of this module as a launcher would start them. With 0 it forks itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_together(function: str, sizes: str, folder: Path, *arguments: Any, timeout: int = 300) -> None:
    """Run a function of this module in processes of each size; fails where one of them does."""
    words = [sys.executable, str(HERE / "together.py"), function, sizes, str(folder), *map(str, arguments)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def launcher_words(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Started:
    """`buleyean` in several processes, as a launcher starts them.

    Args:
        size: how many.
        words: of the command.
        environment: more of it, of each rank.
        python: what each runs in place of the command; it is given `words`.
    """

    def __init__(
        self,
        size: int,
        words: Sequence[Any],
        environment: Mapping[int, Mapping[str, str]] | None = None,
        python: Sequence[str] = ("-m", "buleyean_rl"),
    ) -> None:
        port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, *python, *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **launcher_words(rank, size, port), **(environment or {}).get(rank, {})},
            )
            for rank in range(size)
        ]

    def wait(self, seconds: float = 300) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each."""
        try:
            return [(p.returncode, *printed) for p in self.processes if (printed := p.communicate(timeout=seconds))]
        finally:
            self.kill()

    def kill(self, rank: int | None = None) -> None:
        """Kill one, or all that are left."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()


# --- what they do


def train_steps(folder: Path, names: str) -> None:
    """Twenty steps in fp64 with each of some settings; the weights and the log of each."""
    import json

    import torch

    from adapted import adapted, stir
    from buleyean_rl.data.trie import merge_responses
    from buleyean_rl.training.processes import join
    from tiny import tiny_llama, tiny_tokenizer
    from tiny_trainer import trainer

    records = [  # of very different lengths, and so many that no batch of several divides them
        merge_responses(
            [5, 6, number],
            [([20 + i for i in range(2 + number % 9 * 4)], [True] * (2 + number % 9 * 4)), ([30], [True])],
            [9, 2],
            [9, 9],
        )
        for number in range(40, 51)
    ]
    accepted = [merge_responses([7, number], [([25, 26, number], [True] * 3)], [0], [1]) for number in range(60, 67)]
    settings: dict[str, dict[str, Any]] = {
        "complement": {"gradient_accumulation_steps": 2},
        "listwise": {"objective": "listwise"},
        "published": {"objective": "published", "micro_batch_tokens": 30},
        "dropout": {"micro_batch_tokens": 60},
    }
    tokenizer = tiny_tokenizer()
    with join() as processes:
        if processes.size > 1:
            share_values(processes, folder)
        for name in names.split(","):
            model = stir(adapted(lambda: tiny_llama(tokenizer), dropout=0.2 if name == "dropout" else 0.0)).double()
            run = trainer(
                model,
                folder / f"{name}-{processes.rank}",
                records,
                anchors=[accepted] if name in ("complement", "dropout") else [],
                max_steps=20,
                learning_rate=1e-3,
                per_device_train_batch_size=6 // processes.size,
                **settings[name],
            )
            run.train()
            weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
            log = [entry for entry in run.state.log_history if "floor" in entry]
            torch.save(weights, folder / f"{name}-{processes.rank}.pt")
            (folder / f"{name}-{processes.rank}.json").write_text(json.dumps(log))


def share_values(processes: Any, folder: Path) -> None:
    """Every word that processes have for each other."""
    import torch

    rank, size = processes.rank, processes.size
    assert processes.sum(torch.tensor([1.5, rank])).tolist() == [1.5 * size, sum(range(size))]
    assert processes.once(lambda: {"of": rank, "text": "é", "nothing": None}) == {
        "of": 0,
        "text": "é",
        "nothing": None,
    }
    assert processes.all(["x" * rank, rank]) == [["x" * other, other] for other in range(size)]
    assert processes.maximum(rank) == size - 1
    values = [torch.full((2, 2), float(rank)), torch.full((3,), float(rank))]
    processes.copy(values)
    assert all((value == 0).all() for value in values)
    order = folder / "order"
    with processes.host_first():
        assert order.exists() == (rank > 0)
        order.touch()
    given = folder / "given"
    if processes.is_first:
        (given / "deep").mkdir(parents=True)
        (given / "a").write_bytes(b"1" * 100_000)
        (given / "empty").touch()
    received = processes.receive(given, folder / str(rank))
    assert received is not None
    assert (received == given) == (rank == 0)
    assert ((received / "a").stat().st_size, (received / "empty").stat().st_size) == (100_000, 0)
    assert processes.receive(None, folder / str(rank)) is None
    alone = processes.receive(given / "a", folder / str(rank))
    assert alone is not None
    assert alone.read_bytes() == b"1" * 100_000
    processes.check_same("settings", {"a": 1})
    assert processes.describe() == {"processes": size, "hosts": 1}


def mine_words(folder: Path) -> None:
    """Mine with an engine whose answers depend on what is computed beside them; the first process writes."""
    from buleyean_rl.inference.protocol import Answer, BaseEngine, Unanswered
    from buleyean_rl.mining import draws
    from buleyean_rl.mining.judges import find_judge
    from buleyean_rl.mining.mine import MineSettings, mine
    from buleyean_rl.training.processes import join

    class Talker(BaseEngine):
        is_batched = True

        def answers(self, conversations: Any, _sampling: Any, seeds: Any, _on_tokens: Any) -> Any:
            without = {"7": Unanswered("refused", "no"), "8": Unanswered("failed", "gone", is_permanent=False)}
            for index, messages in enumerate(conversations):
                prompt = messages[-1]["content"]
                said = f"{prompt} é {seeds[index]} of {len(conversations)}"
                yield index, without.get(prompt) or Answer(said, 3, True, (1,))

        def close(self) -> None:
            pass

    draws.WINDOW = 4
    folder.mkdir(parents=True, exist_ok=True)
    prompts, judges = [str(number) for number in range(23)], [find_judge("regex:[02468] é")]
    settings = MineSettings(samples=2, temperature=1.0)
    with join() as processes:
        mined = mine(prompts, Talker, "talker", judges, folder / "r.jsonl", settings)
        report = mined.report
        assert (report.answers, report.unanswered) == (42, {"refused": 2, "failed": 2})
        assert processes.all(report.rejected) == [report.rejected] * processes.size
        again = mine(prompts, Talker, "talker", judges, folder / "r.jsonl", settings)
        assert (again.report.answers_reused, again.report.asked_again) == (42, 2)


def train_until_killed(root: Path, base: str, records: str, kills: str) -> None:
    """A run of two processes, one of which is killed so often; then it is finished. Its folder: `root / "run"`."""
    import random

    choice = random.Random(0)
    run, words = root / "run", ["train", records, "--model", base, "-o", str(root / "run"), *TRAINING]
    for _ in range(int(kills)):
        victim, steps = choice.randrange(2), choice.randrange(1, 13)
        codes = forked(2, lambda rank: _train(_going_on(words, run), steps if rank == victim else None))  # noqa: B023
        if (run / "run.json").exists():
            return
        assert codes[victim] == -signal.SIGKILL, codes
        assert codes[1 - victim] == 1, codes
    assert forked(2, lambda _: _train(_going_on(words, run))) == [0, 0]


def _going_on(words: Sequence[str], run: Path) -> list[str]:
    return [*words, *(["--resume"] if (run / "settings.json").exists() else [])]


TRAINING = ("--max-steps", "80", "--batch-size", "1", "--lr", "1e-2", "--no-guard")


def _train(words: Sequence[str], steps: int | None = None) -> int:
    """The command, without what takes longer than training; killed after so many steps of its own."""
    import pytest

    from buleyean_rl.cli import main
    from buleyean_rl.training import heartbeat, processes
    from buleyean_rl.training.trainer import BuleyeanTrainer
    from quick import make_runs_quick

    heartbeat.BEAT_SECONDS = processes.BEAT_SECONDS = 0.2
    make_runs_quick(pytest.MonkeyPatch())
    step = BuleyeanTrainer.training_step

    def step_and_die(self: Any, *given: Any) -> Any:
        nonlocal steps
        loss = step(self, *given)
        if steps is not None and (steps := steps - 1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    BuleyeanTrainer.training_step = step_and_die  # type: ignore[method-assign]
    return main(words)


def forked(size: int, call: Callable[[int], int | None], seconds: float = 240) -> list[int]:
    """The exit codes of so many forks that call a function with their rank, which returns None or one."""
    port, children = free_port(), {}
    for rank in range(size):
        child = os.fork()
        if not child:
            if size > 1:
                os.environ.update(launcher_words(rank, size, port))
            code = call(rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)  # an error's traceback ends it otherwise
        children[child] = rank
    deadline, codes = time.monotonic() + seconds, [0] * size
    while children:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[children.pop(ended)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _main() -> None:
    import torch  # noqa: F401

    import buleyean_rl.training.run  # noqa: F401 - all that takes long, before the forks

    name, sizes, root, *arguments = sys.argv[1:]
    function = globals()[name]
    if sizes == "0":  # it forks itself
        function(Path(root), *arguments)
        return
    for size in map(int, sizes.split(",")):
        folder = Path(root) / f"of-{size}"
        folder.mkdir(parents=True)
        codes = forked(size, lambda _: function(folder, *arguments))  # noqa: B023
        if any(codes):
            sys.exit(f"of {size} processes: {codes}")


if __name__ == "__main__":
    _main()
