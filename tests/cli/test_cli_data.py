"""The command's data part, run as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from buleyean_rl import __version__
from buleyean_rl.cli import app, main
from printed import error_in

PAIRS = [{"prompt": "p", "chosen": "Yes.", "rejected": "No."}, {"prompt": "q", "chosen": "Yes.", "rejected": ""}]


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    path = Path("pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_import_reports_that_chosen_answers_are_discarded(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", str(pairs), "-o", "r.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 rows -> 2 records" in err
    assert "chosen, accepted or never rejected answers discarded: 2" in err
    assert len(Path("r.jsonl").read_text().splitlines()) == 2


def test_json_is_one_object_on_stdout(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", str(pairs), "-o", "r.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 2
    assert main(["data", "validate", "r.jsonl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["dropped"], report["usable"]) == (2, 1, True)


@pytest.mark.usefixtures("pairs")
def test_validate_fails_on_an_unusable_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.jsonl").write_text('{"prompt": "p", "rejected": ["a"]}\n{"prompt": "", "rejected": ["a"]}\n')
    assert main(["data", "validate", "r.jsonl", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["bad"] == 1
    assert "not usable" in err
    assert "r.jsonl:2: the prompt is empty" in err


@pytest.mark.usefixtures("pairs")
def test_validate_counts_a_models_tokens(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from buleyean_rl.data.encode import Encoder
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "Hi", "rejected_responses": ["What is the capital?"], "rejected_spans": [[[0, 4]]]},
        {"prompt": "Hi " * 50, "rejected": ["No."]},
    ]
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    room = Encoder(tokenizer).encode_prompts(["Hi"])[0].length + 2
    words = ["data", "validate", "r.jsonl", "--model", str(base), "--max-length", str(room), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    length = len(tokenizer("What is the capital?", add_special_tokens=False).input_ids)
    assert report["dropped"] == report["tokens"]["over_length"] == 1
    assert report["tokens"]["responses"] == length
    assert (report["tokens"]["truncated"], report["tokens"]["cut"]) == (1, length - 2)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "its files lack model.layers.1.mlp.up_proj.weight"),
        (lambda w: w["model.norm.weight"][3:4].fill_(float("nan")), "model.norm.weight holds NaN or infinity"),
    ],
)
def test_validate_refuses_the_models_that_training_refuses(
    change: Callable[[dict[str, Any]], object], problem: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, "damaged")
    weights = load_file("damaged/model.safetensors")
    change(weights)
    save_file(weights, "damaged/model.safetensors", metadata={"format": "pt"})
    Path("r.jsonl").write_text('{"prompt": "p", "rejected": ["a"]}\n')
    for words in (["data", "validate", "r.jsonl"], ["train", "r.jsonl", "-o", "run"]):
        assert main([*words, "--model", "damaged"]) == 1
        assert f"error: damaged: {problem}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["data", "import", "none.jsonl", "-o", "r"], 1, "error: none.jsonl: no such file"),
        (["data", "import", "empty", "-o", "r"], 1, "error: empty: holds no .txt or .md file"),
        (["data", "import", "pairs.jsonl", "-o", "."], 2, "error: . is a folder"),
        (["data", "import", "pairs.jsonl", "-o", ""], 2, "-o is empty: give a value"),
        (["walk", "-o", ""], 2, "-o is empty"),
        (["demo", "-o", ""], 2, "-o is empty"),
        (["export", "run", "-o", ""], 2, "-o is empty"),
        (["data", "import", "pairs.jsonl", "-o", "none/r"], 2, "create the folder"),
        (["data", "import", "pairs.jsonl", "-o", "pairs.jsonl"], 2, "pairs.jsonl is there already"),
        (
            ["data", "import", "pairs.jsonl", "-o", "r", "--format", "kto"],
            1,
            "pairs.jsonl:1: has no label (its keys: prompt",
        ),
        (["data", "import", "pairs.jsonl", "-o", "r", "--format", "zip"], 2, "error: no format 'zip'"),
        (["data", "import", "pairs.jsonl", "-o", "r", "--limit", "0"], 2, "must be 1 or more"),
        (["data", "import", "pairs.jsonl"], 2, "error: Missing option"),
        (["data", "import", "pairs.jsonl", "-o", "r", "--nope"], 2, "No such option"),
        (["data", "nope"], 2, "No such command 'nope'"),
        (["data", "imprt"], 2, "Did you mean 'import'? See `buleyean data --help`."),
        (["train", "--learning-rate", "1"], 2, "Did you mean --lr? See `buleyean train --help`."),
        (["train", "--resum"], 2, "--resume"),
        (["data", "validate", "none.jsonl"], 1, "no such file"),
    ],
)
def test_a_wrong_request_is_one_clear_line(
    pairs: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, problem: str
) -> None:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in error_in(err)
    assert sorted(os.listdir()) == ["empty", pairs.name]


@pytest.mark.usefixtures("pairs")
def test_debug_shows_the_traceback() -> None:
    from buleyean_rl.errors import RecordError

    for words in (["--debug", "data", "validate", "none"], ["data", "validate", "none", "--debug"]):
        with pytest.raises(RecordError):
            main(words)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped: nothing was written\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (PermissionError(13, "Permission denied", "x/y"), 1, "error: x/y: Permission denied\n"),
    ],
)
@pytest.mark.usefixtures("pairs")
def test_errors_of_the_system_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    from buleyean_rl.data import records

    def trouble(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(records, "validate_records", trouble)
    assert main(["data", "validate", "r.jsonl"]) == code
    out, err = capsys.readouterr()
    assert (out, err.partition("checking r.jsonl\n")[2]) == ("", message)


@pytest.mark.usefixtures("pairs")
def test_a_bug_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from buleyean_rl.data import records

    monkeypatch.setattr(records, "validate_records", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["data", "validate", "r.jsonl"])


@pytest.mark.parametrize("words", [[], ["--help"], ["data"], ["data", "--help"], ["data", "import", "--help"]])
def test_help_is_on_stdout(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "Usage: buleyean" in out
    assert err == ""


def test_help_cuts_nothing_off_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group = typer.main.get_command(app)
    for words in ([], *([name] for name in group.commands), ["data", "import"], ["data", "validate"]):  # type: ignore[attr-defined]
        assert main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert not [line for line in text.splitlines() if line.endswith("...") and "Usage" not in line]


@pytest.mark.parametrize(
    ("typed", "words"), [("buleyean ru", ["runs"]), ("buleyean train --pr", ["--preset", "--print-config"])]
)
def test_the_shell_completes(
    typed: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_BULEYEAN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    out, err = capsys.readouterr()
    assert out.split() == words
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from buleyean_rl.cli import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'rich.console')))"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - start < 5, "a loose bound: the machine may be busy"


def test_a_closed_pipe_is_no_traceback() -> None:
    code = "import sys; from buleyean_rl.cli import main; sys.exit(main(['--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
