"""Absurd values for every option of every command, and for every setting of a YAML file."""

from __future__ import annotations

import io
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer.main

from buleyean_rl.cli import app
from buleyean_rl.errors import EngineError
from buleyean_rl.training.settings import OTHER_NAMES, SETTINGS
from hostile.attack import HANG_SECONDS, assert_clear, run_command, untouched
from hostile.scale import runs
from quick import make_runs_quick

pytestmark = pytest.mark.slow
SEED, CASES = 33, 166

WORDS = [
    *("", " ", "-1", "0", "nan", "inf", "-inf", "1e309", "1e-300", "0.5", "9" * 400, "99999999999999999999", "null"),
    *(
        "true",
        "{}",
        "[]",
        "--",
        "a,b",
        "\udcff",
        "\u2028",
        "[red]x[/red]",
        "[/]",
        "x" * 5000,
        "..",
        "foreign",
        "theirs.txt",
    ),
]
YAML = [
    *("null", "true", "-1", "0", "0.5", ".nan", "-.inf", "1e309", "1e-300", "9" * 5000, "abc", "''", "'2'", "[]", "{}"),
    *("[1, [2]]", "{a: {b: c}}", "2020-01-01", "!!binary aGk=", "!!float ''", "!!python/object:os.system x", "&a [*a]"),
    *('"\\ud800"', "\n  - x\n  - 3", "1_000", "0x10", "1e3", "9.99e99", "[red]", "!!set {a, b}"),
]

# What each command is run with beside the option under attack; a later word goes over an earlier one.
COMMANDS = {
    "train": "records.jsonl --model base -o run --max-steps 2",
    "data import": "records.jsonl -o imported.jsonl",
    "data validate": "records.jsonl",
    "evaluate": "base --prompts prompts.txt --max-tokens 2 --limit 2 --neutral prompts.txt",
    "export": "trained -o model.gguf",
    "mine": "prompts.txt --model base -o mined.jsonl --max-tokens 2",
    "walk": "prompts.txt --model base -o walk --rounds 1 --max-tokens 2 --held-out prompts.txt",
    "chat": "missing.gguf --prompt Hi",
    "push": "trained --to nobody/nothing --yes",
    "demo": "--quick -o demo",
    "void": "--model missing -o void",
    "doctor": "--json",
}


def options() -> list[tuple[str, str]]:
    """Each command with each of its options that has a value."""

    def below(command: Any, name: str) -> list[tuple[str, str]]:
        valued = [
            (name, parameter.opts[0])
            for parameter in command.params
            if parameter.param_type_name == "option" and not parameter.is_flag and name
        ]
        for word, child in getattr(command, "commands", {}).items():
            valued += below(child, f"{name} {word}".strip())
        return valued

    return below(typer.main.get_command(app), "")


def cases() -> list[tuple[str, str, str]]:
    """A command, an option or `yaml:` and a setting, and its value."""
    keys = [("train", f"yaml:{name}") for name in [*SETTINGS, *OTHER_NAMES, "preset", "fp16", "deepspeed"]]
    draw = random.Random(SEED)
    attacks = [
        (command, option, draw.choice(YAML if "yaml:" in option else WORDS)) for command, option in options() + keys
    ]
    draw.shuffle(attacks)
    more = [(*draw.choice(options() + keys),) for _ in range(CASES)]
    attacks += [(command, option, draw.choice(YAML if "yaml:" in option else WORDS)) for command, option in more]
    return attacks[: runs(CASES)]


@contextmanager
def ended_within(seconds: int) -> Iterator[None]:
    """End what hangs, with its traceback."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def trained(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "trained"
    assert run_command("train", rejections, "--model", base, "-o", folder, "--max-steps", "2", "--no-guard").code == 0
    return folder


@pytest.fixture
def folder(base: Path, rejections: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: all that the commands need, and what is somebody else's."""
    for name, target in (("base", base), ("trained", trained)):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "records.jsonl").write_bytes(rejections.read_bytes())
    (tmp_path / "prompts.txt").write_text("Hi there, how are you?\nAnd what do you think of it?\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("theirs")
    (tmp_path / "theirs.txt").write_text("theirs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    make_runs_quick(monkeypatch)

    def no_demo(*_: Any, **__: Any) -> Callable[..., Any]:
        raise EngineError("not in a test")

    monkeypatch.setattr("buleyean_rl.demo.engine_of", no_demo)
    return tmp_path


@pytest.mark.parametrize(("command", "option", "value"), cases())
def test_an_absurd_value_is_taken_or_refused(command: str, option: str, value: str, folder: Path) -> None:
    words = [*command.split(), *COMMANDS[command].split()]
    if option.startswith("yaml:"):
        (folder / "run.yaml").write_text(f"{option.removeprefix('yaml:')}: {value}\n")
        words += ["--config", "run.yaml"]
    else:
        words += [option, value]
    with untouched(folder / "foreign"), ended_within(HANG_SECONDS):
        outcome = run_command(*words)
    assert "longer than" not in outcome.err
    assert_clear(outcome)
    assert (folder / "theirs.txt").read_text() == "theirs"
    assert "nan" not in outcome.err.lower().replace(value.lower(), "").split() or outcome.code != 0
