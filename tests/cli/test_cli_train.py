"""`buleyean train` as a user runs it, and the options every command has: adding one is a decision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from buleyean_rl.cli import app, main
from buleyean_rl.errors import RecordError
from buleyean_rl.training import before_after

OPTIONS = {
    "": "--debug --version",
    "demo": "--output -o --quick --engine --json",
    "train": "RECORDS --model --output -o --config --preset --objective --alpha --tau --lr --epochs --max-steps "
    "--batch-size --max-length --micro-batch-tokens --guard --held-out --lora-rank --adapter-scale --seed --resume "
    "--skip-bad --json",
    "evaluate": "MODEL --pairs --records --neutral --prompts --reference --compare --json --plot --limit --max-tokens "
    "--max-length --engine --seed --skip-bad",
    "export": "RUN --output -o --quant --adapter --ollama --name --author --license --url --engine --json",
    "chat": "MODEL.GGUF --compare --prompt --system --max-tokens --temperature --seed --engine",
    "push": "PATH... --to --run --license --public --message --yes --json",
    "mine": "[PROMPTS] --model --output -o --judge --rubric --samples --temperature --max-tokens --seed --engine "
    "--json",
    "walk": "[PROMPTS] --model --output -o --rounds --held-out --judge --rubric --samples --temperature --max-tokens "
    "--seed --epochs --lr --adapter-scale --config --max-drift --json",
    "void": "--model --output -o --host --port",
    "doctor": "--need --json",
    "data import": "SRC --output -o --format --split --limit --column --score --below --redact --skip-bad --json",
    "data validate": "RECORDS --model --max-length --json",
}


def options(command: object, name: str = "") -> dict[str, str]:
    """What the command and those below it take, in order."""
    words = []
    for parameter in command.params:  # type: ignore[attr-defined]
        words += parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
    options_by_command = {name: " ".join(words)}
    for below, child in getattr(command, "commands", {}).items():
        options_by_command |= options(child, f"{name} {below}".strip())
    return options_by_command


def test_the_options_are_frozen() -> None:
    options_by_command = options(typer.main.get_command(app))
    assert options_by_command.pop("data") == ""
    assert options_by_command == OPTIONS


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(before_after, "MAX_NEUTRAL_TOKENS", 8)


def run(*words: object) -> int:
    return main(["train", *map(str, words)])


def test_train_writes_and_reports_a_run(base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("learning_rate: 1e-3\nlora_rank: 2\n")
    options = (
        "--max-steps 2 --batch-size 2 --lora-rank 4 --seed 7 --held-out 0.2 --alpha 0.6 --tau 1.5 --config run.yaml"
    )
    assert run(rejections, "--model", base, "-o", "run", *options.split(), "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert {"format": 2} | report == json.loads(Path("run/run.json").read_text())
    assert (report["steps"], report["records"], report["records_held_out"]) == (2, 8, 2)
    settings = {"learning_rate": 1e-3, "lora_rank": 4, "seed": 7, "held_out": 0.2, "alpha": 0.6, "tau": 1.5}
    assert settings.items() <= report["config"].items()
    assert "8 records to train on, 2 held out" in err
    assert "optimality gap" in err


def test_the_published_objective_warns(base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--objective", "published", "--max-steps", 2, "--batch-size", 2, "--lr", "1e-3", "-o", "run")
    assert run(rejections, "--model", base, *words) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "warning: the published contrast is a cross-entropy towards the rejected tokens" in " ".join(err.split())


GOOD = '{"prompt": "Hi", "rejected_responses": ["No"], "rejection_counts": [1], "total_rounds": 1}\n'


def row(**changes: object) -> str:
    return json.dumps(json.loads(GOOD) | changes) + "\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "r.jsonl: "),
        (b"\x00\xff\xfe\x01" * 9, "r.jsonl"),
        (GOOD * 2 + "{oops\n", "r.jsonl:3: "),
        (row(rejection_counts=[1, 2]), "r.jsonl:1: "),
        (row(rejection_counts=[2]), "r.jsonl:1: "),
        (row(total_rounds=0), "r.jsonl:1: "),
        (row(rejection_counts=[-1]), "r.jsonl:1: "),
        (row(rejection_counts=[0.5]), "r.jsonl:1: "),
        (row(prompt=""), "r.jsonl:1: the prompt is empty"),
        (row(rejected_responses=["   "]), "r.jsonl:1: "),
        (row(prompt="word " * 3000), "no prompt leaves room for a response in 1024 tokens"),
    ],
)
def test_bad_records_are_one_line_and_no_model_is_loaded(
    content: str | bytes,
    problem: str,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("buleyean_rl.models.model.load_for_inference", lambda *_: pytest.fail("the model was loaded"))
    Path("r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("r.jsonl", "--model", base, "-o", "run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ("missing.jsonl --model {base} -o run", 1, "missing.jsonl: no such file: check the path"),
        (". --model {base} -o run", 1, ".: is a folder: name a file in it"),
        ("r.jsonl --model nonsense -o run", 1, "unknown model 'nonsense'"),
        ("r.jsonl --model org/no-such-model -o run", 1, "cannot load model 'org/no-such-model'"),
        ("r.jsonl --model {base} -o run --objective dpo", 2, "unknown objective 'dpo'"),
        ("r.jsonl --model {base} -o run --alpha 7", 2, "alpha must be above 0"),
        ("r.jsonl --model {base} -o run --lr fast", 2, "'--lr'"),
        ("r.jsonl --model {base} -o r.jsonl", 2, "r.jsonl is a file: name a folder for the run"),
        ("r.jsonl --model {base} -o r.jsonl/run", 1, "Not a directory"),
        ("r.jsonl --model {base} -o run --resume", 2, "nothing to resume in run"),
        ("r.jsonl --model {base} -o run --config no.yaml", 2, "no.yaml: cannot be read"),
        ("r.jsonl --model {base}", 2, "--output"),
        ("r.jsonl -o run", 2, "--model"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: str, code: int, problem: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.jsonl").write_text(GOOD)
    assert run(*words.format(base=base).split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert len(err.splitlines()) <= 2
    assert Path("r.jsonl").read_text() == GOOD


def test_debug_shows_where_an_error_came_from(base: Path) -> None:
    with pytest.raises(RecordError):
        run("missing.jsonl", "--model", base, "-o", "run", "--debug")
