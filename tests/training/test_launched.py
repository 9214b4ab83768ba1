"""The command under a launcher: one run of several processes; one fails, and all end with one message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import adapter_bytes, logged_steps

from together import HERE, Started, run_together

pytestmark = pytest.mark.slow
WORDS = ("--max-steps", 8, "--batch-size", 1, "--lr", "1e-4")

FAILING = """
import errno, os, signal, sys

from buleyean_rl.cli import main
from buleyean_rl.training.trainer import BuleyeanTrainer

victim, step, how, *words = sys.argv[1:]
log = BuleyeanTrainer.log

def fail(self, logs, *given):
    log(self, logs, *given)
    if self.args.processes.rank == int(victim) and self.state.global_step == int(step):
        if how == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        if how == "bug":
            raise ValueError("a bug")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}[how])

BuleyeanTrainer.log = fail
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def together(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, not to be changed."""
    run = tmp_path_factory.mktemp("together") / "run"
    first, second = Started(2, train_words(base, rejections, run, "--json")).wait()
    assert (first[0], second) == (0, (0, "", "")), first[2] + second[2]
    assert json.loads(first[1])["numerics"]["processes"] == 2
    assert "2 processes" in first[2]
    return run


def train_words(base: Path, records: Path, run: Path, *more: Any) -> list[Any]:
    return ["train", records, "--model", base, "-o", run, *WORDS, *more]


def test_a_run_of_two_processes_is_that_of_one(together: Path, base: Path, rejections: Path, tmp_path: Path) -> None:
    words = [*train_words(base, rejections, tmp_path / "one"), "--batch-size", 2]
    ((code, _, err),) = Started(1, words).wait()
    assert code == 0, err
    one, two = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "one", together))
    assert (two["numerics"]["processes"], two["numerics"]["hosts"]) == (2, 1)
    assert (two["steps"], two["tokens"], two["records"]) == (one["steps"], one["tokens"], one["records"])
    assert [check["step"] for check in two["guard"]["checks"]] == [check["step"] for check in one["guard"]["checks"]]
    assert sorted(path.name for path in together.iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    check_close(together, tmp_path / "one")


def check_close(run: Path, other: Path) -> None:
    """In bf16 Adam makes a step of the rounding of a small gradient, so the losses stay together, not the weights."""
    steps, others = logged_steps(run), logged_steps(other)
    assert [step["tokens"] for step in steps] == [step["tokens"] for step in others]
    assert steps[0]["grad_norm"] == pytest.approx(others[0]["grad_norm"], rel=2e-2)
    for step, same in zip(steps, others, strict=True):
        assert step["loss"] == pytest.approx(same["loss"], rel=2e-2)


@pytest.mark.parametrize(
    ("victim", "how", "message"),
    [
        (1, "kill", r"process 1 on \S+: it does not answer any more; go on with --resume"),
        (0, "kill", r"process 0 on \S+: it (does not answer|cannot be reached) any more; go on with --resume"),
        (1, "stop", r"process 1 on \S+: it does not answer any more; go on with --resume"),
        (1, "full disk", r"process 1 of 2: .*: No space left on device"),
        (1, "bug", "ValueError: a bug"),
        (1, "interrupt", r"process 1 on \S+: stopped"),
    ],
)
def test_one_that_fails_ends_all_with_one_message(
    victim: int, how: str, message: str, together: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = Started(2, [victim, 5, how, *train_words(base, rejections, run)], python=("-c", FAILING))
    if how == "stop":
        other = started.processes[1 - victim]
        printed = other.communicate(timeout=120)[1]
        codes = {1 - victim: other.returncode}
        started.kill()
    else:
        ended = started.wait(120)
        codes, printed = {rank: code for rank, (code, *_) in enumerate(ended)}, "".join(err for _, _, err in ended)
    assert codes[1 - victim] == 1
    assert len(re.findall(r"(?m)^(?:\[rank1\]: )?(error|ValueError): ", printed)) == 1, printed
    assert re.search(message, printed), printed
    ((code, _, err), _) = Started(2, train_words(base, rejections, run, "--resume")).wait()
    assert code == 0, err
    assert "the run goes on after step" in err
    assert adapter_bytes(run) == adapter_bytes(together)


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_callback_of_the_first_process_ends_all(event: str, base: Path, rejections: Path, tmp_path: Path) -> None:
    words = [event, *train_words(base, rejections, tmp_path / "run")]
    ended = Started(2, words, python=("-c", STOPPING)).wait(120)
    assert [code for code, *_ in ended] == [0, 0], ended
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    checked = [check["step"] for check in report["guard"]["checks"]]
    assert (report["steps"], checked) == (3, [3] if event == "on_step_end" else [])


def test_ctrl_c_is_told_once(base: Path, rejections: Path, tmp_path: Path) -> None:
    """All have it from the terminal."""
    interrupted = FAILING.replace("self.args.processes.rank == int(victim) and ", "")
    words = [0, 5, "interrupt", *train_words(base, rejections, tmp_path / "run")]
    first, second = Started(2, words, python=("-c", interrupted)).wait(120)
    assert (first[0], second) == (130, (130, "", "")), (first, second)
    assert re.search(r"stopped: step \d of 8 is kept", first[2])
    assert "error" not in first[2]


def test_a_slow_process_is_not_a_dead_one(together: Path, base: Path, rejections: Path, tmp_path: Path) -> None:
    sleeping = FAILING.replace("def fail", "import time\ndef fail").replace('how == "bug"', 'how == "slow"')
    sleeping = sleeping.replace('raise ValueError("a bug")', "return time.sleep(25)")
    run = tmp_path / "run"
    ended = Started(2, [1, 5, "slow", *train_words(base, rejections, run)], python=("-c", sleeping)).wait(200)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert adapter_bytes(run) == adapter_bytes(together)


def test_a_run_goes_on_with_another_number_of_processes(
    together: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    Started(2, [0, 5, "bug", *train_words(base, rejections, run)], python=("-c", FAILING)).wait()
    ended = Started(3, train_words(base, rejections, run, "--resume")).wait()
    assert [code for code, *_ in ended] == [0, 0, 0], ended
    assert "the run began with 2 processes and goes on with 3" in ended[0][2]
    check_close(run, together)


def test_own_samples_are_drawn_once(base: Path, rejections: Path, tmp_path: Path) -> None:
    words = train_words(base, rejections, tmp_path / "run", "--objective", "listwise", "--no-guard")
    ended = Started(2, words).wait()
    assert [code for code, *_ in ended] == [0, 0], ended


def test_twenty_kills_change_nothing(base: Path, rejections: Path, tmp_path: Path) -> None:
    run_together("train_until_killed", "0", tmp_path / "killed", base, rejections, 20, timeout=900)
    run_together("train_until_killed", "0", tmp_path / "whole", base, rejections, 0)
    killed, whole = (adapter_bytes(tmp_path / name / "run") for name in ("killed", "whole"))
    assert killed == whole


def test_what_differs_among_processes_is_named(base: Path, rejections: Path, tmp_path: Path) -> None:
    more = {1: {"OMP_NUM_THREADS": "2"}}
    ended = Started(2, train_words(base, rejections, tmp_path / "run"), more).wait()
    assert [code for code, *_ in ended] == [2, 1], ended
    assert "do not have the same computation: threads is 1 in process 0" in ended[0][2]
    assert ended[1][2] == ""


@pytest.mark.parametrize("words", [("runs", "."), ("train", "--dry-run")])
def test_other_commands_are_one_process(words: Sequence[str], base: Path, rejections: Path) -> None:
    rest = (rejections, "--model", base, "-o", "run") if words[0] == "train" else ()
    ended = Started(2, [*words, *rest]).wait()
    assert all(code for code, *_ in ended)
    assert len(re.findall("error: ", "".join(err for *_, err in ended))) == 1
    assert "is one process, and 2 were started" in "".join(err for *_, err in ended)


def test_torchrun_starts_it(together: Path, base: Path, rejections: Path, tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "buleyean_rl",
    ]
    words = [*torchrun, *map(str, train_words(base, rejections, tmp_path / "run"))]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(together)


# --- hosts


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable, as two hosts."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = [f"buleyean-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_a_host_that_is_cut_off_ends_all(
    hosts: list[str], together: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    """Each host has a message, and the run goes on to the same bytes."""

    def start(*more: str) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", host, sys.executable, "-c", SLOW, *map(str, words), *more],
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
                    **{"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"cable{rank}", "HOSTNAME": host},
                },
            )
            for rank, host in enumerate(hosts)
        ]

    words = train_words(base, rejections, tmp_path / "run")
    started = start()
    try:
        while not list((tmp_path / "run").glob("checkpoint-*")) and started[0].poll() is None:
            time.sleep(0.1)
        subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable1", "down"], check=True)
        cut = time.monotonic()
        printed = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert time.monotonic() - cut < 45, printed  # 30 on a machine that is not busy
    assert [process.returncode for process in started] == [1, 1]
    assert "process 1 on" in printed[0]
    assert "process 0 on" in printed[1]
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable1", "up"], check=True)
    again = start("--resume")
    printed = [process.communicate(timeout=200)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["numerics"]["hosts"] == 2
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(together)


def test_torchrun_joins_two_hosts(
    hosts: list[str], together: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    """By the script of the examples."""
    options = [str(word) for word in WORDS]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, "sh", str(HERE.parent / "examples/launchers/two_hosts.sh"), str(number)],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                **{"FIRST_HOST": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"cable{number}", "OMP_NUM_THREADS": "1"},
                **{"RECORDS": str(rejections), "MODEL": str(base), "RUN": str(tmp_path / "run")},
                "OPTIONS": " ".join(options),
            },
        )
        for number, host in enumerate(hosts)
    ]
    printed = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(together)


STOPPING = """
import sys
from pathlib import Path

from transformers import TrainerCallback

from buleyean_rl import train
from buleyean_rl.training.config import load_config

event, _, records, _, base, _, run, *_ = sys.argv[1:]

class Stop(TrainerCallback):
    pass

def stop(self, args, state, control, **_):
    control.should_training_stop |= state.global_step == 3

setattr(Stop, event, stop)
train(records, base, load_config(None, Path(run), {"max_steps": 8, "learning_rate": 1e-4}), callbacks=[Stop()])
"""
SLOW = f"""
import socket, sys, time
sys.path.insert(0, {str(HERE)!r})
import os
socket.gethostname = lambda: os.environ["HOSTNAME"]

from buleyean_rl.cli import main
from buleyean_rl.training.trainer import BuleyeanTrainer

step = BuleyeanTrainer.training_step

def wait(*given):
    time.sleep(1)
    return step(*given)

BuleyeanTrainer.training_step = wait
sys.exit(main(sys.argv[1:]))
"""
