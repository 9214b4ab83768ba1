"""Every command where people see it: on a terminal of 80 columns, in a pipe, without colour, and stopped by Ctrl-C."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from buleyean_rl.cli import main
from buleyean_rl.system.progress import ProgressBar, working
from quick import make_runs_quick
from tiny import tiny_run

COMMANDS = {
    "data import": "data import log.jsonl -o imported.jsonl",
    "data validate": "data validate {records} --model {base}",
    "dry run": "train {records} --model {base} -o run --max-steps 1 --dry-run",
    "train": "train {records} --model {base} -o run --max-steps 1",
    "runs": "runs",
    "export": "export {run} -o model.gguf",
    "chat": "chat {run} --prompt Hi --max-tokens 4",
    "evaluate": "evaluate {run} --compare {base} --neutral texts.txt --prompts prompts.txt --max-tokens 4",
    "mine": "mine prompts.txt --model {base} --judge regex:. --max-tokens 4",
    "walk": "walk prompts.txt --model {base} --held-out held-out.txt --judge regex:. --max-tokens 4 --rounds 1",
    "doctor": "doctor",
}
SLOW_IMPORTS = ("torch", "transformers", "datasets", "peft", "matplotlib")
ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d[\dm;]*m?")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "run", base)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_runs_quick(monkeypatch)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    Path("log.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}\n' * 2)
    Path("texts.txt").write_text("The quick brown fox.\nThe lazy dog.\n")
    Path("prompts.txt").write_text("Hi\nName a colour.\n")
    Path("held-out.txt").write_text("Name a river.\n")


def use_terminal(patch: pytest.MonkeyPatch) -> Terminal:
    """From now on output goes to a terminal; in a test itself, as pytest captures between a fixture and a test."""
    stream = Terminal()
    patch.setattr(sys, "stdout", stream)
    patch.setattr(sys, "stderr", stream)
    return stream


def words_of(command: str, base: Path, run: Path, rejections: Path) -> list[str]:
    return COMMANDS[command].format(base=base, run=run, records=rejections).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_piped_output_has_no_escape_sequence_and_no_empty_line(
    command: str, base: Path, run: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of(command, base, run, rejections)) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    assert all(line.strip() for line in err.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_of_80_columns_without_colour(
    command: str, base: Path, run: Path, rejections: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(words_of(command, base, run, rejections)) == 0
    shown = terminal.getvalue()
    assert command == "runs" or ESCAPE.search(shown)  # all others have something that moves
    assert not COLOUR.search(shown)
    lines = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", shown)) if not line.startswith("Next: ")]
    assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []  # a path is never cut


def test_a_terminal_whose_cursor_does_not_move_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with working(Console(), "reading"), ProgressBar(Console(), "training", 2) as bar:
        bar.update(1, 2, "1 of 2 steps")
    assert terminal.getvalue() == "reading\n"


def test_the_first_line_comes_before_what_is_slow_to_import(tmp_path: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name in {SLOW_IMPORTS}:
            raise ImportError("imported " + name)
sys.meta_path.insert(0, Refuse())
from buleyean_rl.cli import main
for words in {[*COMMANDS.values(), "demo -o demo", "void -o void", "push none --to a/b"]}:
    print("$", words, file=sys.stderr)
    try:
        main(words.split())
    except ImportError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    first = dict(re.findall(r"^\$ (.*)\n(.*)$", done.stderr, re.MULTILINE))
    assert len(first) == len(COMMANDS) + 3
    assert [line for line in first.values() if not line or line[0] == "$" or "imported" in line] == []


@pytest.mark.parametrize(
    ("command", "place", "standing", "goes_on"),
    [
        ("data import", "data.importers.import_records", "nothing was written", False),
        ("train", "training.run.open_model", "nothing was trained yet; the same command begins anew", False),
        ("train", "training.run.load_dataset", "before its first checkpoint; the same command begins anew", False),
        ("export", "gguf.export.write_gguf", "no file was written; the same command begins anew", False),
        ("evaluate", "evaluation.measure.own_passages", "nothing was written; the same command begins anew", False),
        ("mine", "mining.mine._collect_verdicts", "what was answered and judged is kept", True),
        ("walk", "mining.walk.train", "what was answered, judged and trained is kept", True),
    ],
)
def test_ctrl_c_says_where_a_command_stands(
    command: str,
    place: str,
    standing: str,
    goes_on: bool,
    base: Path,
    run: Path,
    rejections: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"buleyean_rl.{place}", stop)
    words = words_of(command, base, run, rejections)
    assert main(words) == 130
    *_, before, last = capsys.readouterr().err.splitlines()
    assert (before if goes_on else last) == f"stopped: {standing}"
    assert last.startswith("Go on with: ") == goes_on
    assert not goes_on or last.endswith(" ".join(words))
    assert not Path("model.gguf").exists()
    assert not Path("imported.jsonl").exists()


def test_a_line_of_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    assert main(["export", "nonsense", "-o", "model.gguf"]) == 1
    lines = ESCAPE.sub("", terminal.getvalue()).splitlines()
    assert lines[-2:] == [
        "error: unknown model 'nonsense': give smollm2-135m, smollm2-360m, a Hub id like",
        "org/name, a folder or a GGUF file",
    ]
