"""Commands in processes of their own, each forked in an instant from one that has the libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from buleyean_rl.cli import main
from hostile.attack import HANG_SECONDS, Outcome
from tiny import tiny_run

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["buleyean_rl.mining.walk", "buleyean_rl.gguf.export", "buleyean_rl.data.importers"])


@dataclass(frozen=True)
class Running:
    """A command that was started.

    Args:
        process: of its own.
        log: what it prints.
    """

    process: ForkServerProcess
    log: Path

    def kill(self) -> Outcome:
        """End it as the system does when memory runs out."""
        self.process.kill()
        return self.wait()

    def wait(self, seconds: float = HANG_SECONDS) -> Outcome:
        """Its outcome; it fails the test if it does not end."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            pytest.fail(f"hangs after {seconds:.0f} s: {self.log.read_text()}")
        return Outcome(code, "", self.log.read_text())


def start(words: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Running:
    """Start `buleyean WORDS`.

    Args:
        words: the arguments.
        log: the file to print to.
        environment: variables to set.
    """
    process = _SERVER.Process(target=_command, args=(list(words), str(log), environment or {}), daemon=True)
    process.start()
    return Running(process, log)


def _command(words: list[str], log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    sys.exit(main(words))


@dataclass(frozen=True)
class Inputs:
    """What the commands work on.

    Args:
        base: a tiny model.
        records: rejections of its answers.
        run: a run on it.
        pairs: a file to import.
        prompts: to mine.
        held_out: to measure on.
    """

    base: Path
    records: Path
    run: Path
    pairs: Path
    prompts: Path
    held_out: Path

    def words(self, command: str, folder: Path) -> list[str]:
        """A command whose outputs lie in `folder`."""
        judge = ["--judge", "regex:[a-m][n-z]", "--max-tokens", "12"]
        return list(
            map(
                str,
                {
                    "import": ["data", "import", self.pairs, "-o", folder / "records.jsonl"],
                    "mine": ["mine", self.prompts, "--model", self.base, "-o", folder / "mined.jsonl", *judge],
                    "train": [
                        *("train", self.records, "--model", self.base, "-o", folder / "run", "--lr", "1e-3"),
                        *("--batch-size", "2", "--epochs", "2", "--held-out", "0"),
                    ],
                    "walk": [
                        *("walk", self.prompts, "--held-out", self.held_out, "--model", self.base, *judge),
                        *("-o", folder / "walk", "--rounds", "1", "--epochs", "2", "--max-drift", "99"),
                    ],
                    "export": ["export", self.run, "-o", folder / "model.gguf", "--ollama"],
                }[command],
            )
        )


RESULTS = {  # the same bytes, whatever happened on the way
    "import": ("records.jsonl",),
    "mine": ("mined.jsonl",),
    "train": ("run/adapter_model.safetensors",),
    "walk": ("walk/round-1/records.jsonl", "walk/round-1/run/adapter_model.safetensors"),
    "export": ("model.gguf", "Modelfile"),
}
WHOLE = {"import", "mine", "export"}  # commands whose results have their names only when they are whole


def make_inputs(base: Path, records: Path, folder: Path) -> Inputs:
    """Write the inputs into a folder."""
    pairs = "".join(f'{{"prompt": "Tip {i}?", "chosen": "Yes.", "rejected": "No {i}."}}\n' for i in range(3000))
    for name, text in (
        ("pairs.jsonl", pairs),
        ("prompts.txt", "".join(f"prompt {i}\n" for i in range(8))),
        ("held-out.txt", "".join(f"prompt {i}\n" for i in range(8, 16))),
    ):
        (folder / name).write_text(text)
    run = tiny_run(folder / "run", base)
    return Inputs(base, records, run, *(folder / name for name in ("pairs.jsonl", "prompts.txt", "held-out.txt")))


def results(command: str, folder: Path) -> dict[str, bytes]:
    """The results that are there."""
    return {name: (folder / name).read_bytes() for name in RESULTS[command] if (folder / name).exists()}


def finish(inputs: Inputs, command: str, folder: Path, log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command that was stopped before: it goes on, or says that it had finished."""
    words = inputs.words(command, folder)
    if command == "import":
        words.append("--overwrite")
    if command == "train" and (folder / "run" / "settings.json").exists():
        words.append("--resume")
    outcome = start(words, log, environment).wait()
    has_finished = command == "train" and "finished" in outcome.err
    assert outcome.code == 0 or (has_finished and outcome.code == 2), outcome


@contextmanager
def journals_grow(folder: Path) -> Iterator[None]:
    """No line that a journal has before the context is lost in it."""
    before = {path: path.read_bytes() for path in folder.rglob("*.mined.jsonl")}
    yield
    for path, content in before.items():
        acknowledged = content[: content.rfind(b"\n") + 1]
        assert set(acknowledged.splitlines()) <= set(path.read_bytes().splitlines()), path


def leftovers(folder: Path) -> list[Path]:
    """Locks and unfinished files."""
    return [path for path in folder.rglob(".*") if path.name == ".lock" or ".tmp" in path.name]
