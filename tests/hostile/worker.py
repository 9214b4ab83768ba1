"""A process that runs commands one after the other: what kills it is seen, and a new one goes on."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from hostile.attack import HANG_SECONDS, Outcome, run_command

MEMORY_BYTES = 24 << 30  # of addresses: more than any tiny model takes, less than a size of 2^40


class Worker:
    """Runs `buleyean ARGUMENTS`, many in one process.

    Args:
        environment: of the process, beside this one's.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str | Path) -> Outcome:
        """How a command ended: with the signal as a negative code where it killed the process, or hung."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(argument) for argument in arguments]).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], HANG_SECONDS)
        line = process.stdout.readline() if ready else b""
        if line:
            return Outcome(**json.loads(line))
        if not ready:
            process.kill()
        code = process.wait()
        self._process = None
        return Outcome(code, "", "killed" if ready else f"hung for {HANG_SECONDS} seconds")

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "hostile.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
            | self._environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    """Read argument lists, a line of JSON each; write how each command ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C libraries print must not get between
    for line in sys.stdin:
        outcome = run_command(*json.loads(line))
        print(json.dumps(vars(outcome)), file=results, flush=True)


if __name__ == "__main__":
    main()
