"""`buleyean train` as a user runs it, and the options every command has: adding one is a decision."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from buleyean_rl.cli import app, main
from buleyean_rl.errors import RecordError
from buleyean_rl.training.checkpoints import WriteCheckpoints
from printed import error_in
from quick import make_runs_quick

OPTIONS = {
    "": "--debug --version --install-completion --show-completion",
    "demo": "--output -o --quick --engine --json",
    "train": "RECORDS --model --output -o --config --preset --objective --alpha --tau --lr --epochs --max-steps "
    "--batch-size --max-length --micro-batch-tokens --guard --held-out --base-bits --lora-rank --adapter-scale --seed "
    "--resume --skip-bad --dry-run --print-config --json",
    "runs": "PATH --compare --delete --yes --json",
    "evaluate": "MODEL --pairs --records --neutral --prompts --reference --compare --json --plot --limit --max-tokens "
    "--temperature --max-length --context --engine --seed --skip-bad --overwrite",
    "export": "RUN --output -o --quant --adapter --ollama --name --author --license --url --engine --overwrite --json",
    "chat": "MODEL --compare --lora --rejections --prompt --system --max-tokens --temperature --seed --context "
    "--engine",
    "push": "PATH... --to --run --license --public --message --overwrite --yes --json",
    "mine": "[PROMPTS] --model --output -o --judge --rubric --samples --temperature --max-tokens --seed --context "
    "--engine --keep-accepted --overwrite --json",
    "walk": "[PROMPTS] --model --output -o --rounds --held-out --judge --rubric --samples --temperature --max-tokens "
    "--seed --epochs --lr --adapter-scale --config --engine --server --context --max-drift --json",
    "void": "--model --output -o --host --port",
    "serve": "MODEL --lora --host --port --api-key --name --context --slots --threads --remember",
    "swap": "RUN --url --rollback --api-key --json",
    "connect": "SOURCE --output -o --api-key --score --below --redact --json",
    "doctor": "--need --json",
    "data import": "SRC... --output -o --format --split --limit --column --score --below --encoding --keep-accepted "
    "--redact --skip-bad --overwrite --json",
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
    make_runs_quick(monkeypatch)


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
    assert err.splitlines()[-1].endswith(" chat run")


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (rejections, "--model", base, "-o", "run", "--epochs", 2, "--batch-size", 2, "--held-out", "0.2")
    assert run(*words, "--dry-run", "--json") == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert (plan["records"], plan["records_held_out"], plan["steps"]) == (8, 2, 8)
    assert plan["tokens"] > 0
    assert plan["work_bytes"] > plan["run_bytes"] > 0
    for words in ("would train on 8 records", "for 8 steps", "of memory", "free", "compute: ", "nothing was written"):
        assert words in err
    assert list(Path.cwd().iterdir()) == []


def test_the_printed_config_is_one_that_train_reads(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--print-config", "--preset", "loops", "--max-steps", 1) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert list(Path.cwd().iterdir()) == []
    Path("run.yaml").write_text(out)
    assert run(rejections, "--model", base, "-o", "run", "--config", "run.yaml") == 0
    assert json.loads(Path("run/run.json").read_text())["config"]["learning_rate"] == 7e-4


def test_ctrl_c_says_where_the_run_stands_and_how_it_goes_on(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.yaml").write_text("save_steps: 2\nmax_steps: 4\nguard: false\n")
    words = (rejections, "--model", base, "-o", "run", "--config", "run.yaml")

    def stop_at(step: int) -> None:
        def stop(_: object, args: object, state: TrainerState, *__: object, **___: object) -> None:  # noqa: ARG001
            if state.global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(WriteCheckpoints, "on_step_begin", stop)

    stop_at(1)
    assert run(*words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped: before its first checkpoint; the same command begins anew"
    )
    stop_at(3)
    assert run(*words) == 130
    stopped, command = capsys.readouterr().err.splitlines()[-2:]
    assert stopped == "stopped: step 2 of 4 is kept in run"
    assert command.startswith("Go on with: ")
    assert command.endswith(" -o run --config run.yaml --resume")
    stop_at(-1)
    assert run(*words, "--resume") == 0
    assert "the run goes on after step 2" in capsys.readouterr().err


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
        (row(prompt="word " * 3000), "no prompt leaves room for a response in 512 tokens"),
    ],
)
def test_bad_records_are_one_line_and_no_model_is_loaded(
    content: str | bytes,
    problem: str,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("buleyean_rl.models.model.load_base", lambda *_: pytest.fail("the model was loaded"))
    Path("r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("r.jsonl", "--model", base, "-o", "run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in error_in(err)


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ("missing.jsonl --model {base} -o run", 1, "missing.jsonl: no such file: check the path"),
        (". --model {base} -o run", 1, ".: is a folder: name a file in it"),
        ("r.jsonl --model nonsense -o run", 1, "unknown model 'nonsense'"),
        ("r.jsonl --model org/no-such-model -o run", 1, "cannot load model 'org/no-such-model'"),
        ("r.jsonl --model {base} -o run --objective dpo", 2, "unknown objective 'dpo'"),
        ("r.jsonl --model {base} -o run --alpha 7", 2, "alpha cannot be 7.0"),
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
    assert problem in error_in(err)
    assert Path("r.jsonl").read_text() == GOOD


def test_debug_shows_where_an_error_came_from(base: Path) -> None:
    with pytest.raises(RecordError):
        run("missing.jsonl", "--model", base, "-o", "run", "--debug")


# --- few records


def test_a_single_record_trains_and_changes_the_model(base: Path) -> None:
    """The documentation's own example."""
    Path("one.jsonl").write_text(GOOD)
    assert run("one.jsonl", "--model", base, "-o", "run") == 0
    report = json.loads(Path("run/run.json").read_text())
    assert (report["steps"], report["records"]) == (1, 1)
    assert report["loss_final"] < report["loss_start"]
    assert report["rejected_nll_final"] > report["rejected_nll_base"]


def test_one_step_of_many_records_changes_the_model(base: Path, rejections: Path) -> None:
    assert run(rejections, "--model", base, "-o", "run", "--max-steps", 1, "--lr", "1e-3") == 0
    report = json.loads(Path("run/run.json").read_text())
    assert report["rejected_nll_final"] > report["rejected_nll_base"]


def test_a_log_interval_above_the_steps_has_the_last_step(base: Path, rejections: Path) -> None:
    Path("run.yaml").write_text("logging_steps: 500\nmax_steps: 3\nsave_strategy: 'no'\n")
    assert run(rejections, "--model", base, "-o", "run", "--config", "run.yaml") == 0
    log = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "floor" in entry] == [3]


# --- settings that make no sense for this model or data


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--lora-rank 33", r"lora_rank 33 is above the sizes of .*, 32 x 64: at most 32 has an effect"),
        ("--config warm.yaml", r"a warmup of 1,000 steps and the run has 2: .* never reach 0.0002; .* such as 0.1"),
        ("--tau 30", r"tau 30 is too large for answers that were judged in 60 rounds: .*; at most 19.4 works"),
        ("--max-steps 0", "max_steps cannot be 0"),
        ("--epochs inf", "num_train_epochs cannot be inf"),
        ("--tau nan", "tau cannot be nan"),
    ],
)
def test_absurd_values_are_refused_before_training(
    words: str, problem: str, base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("warm.yaml").write_text("warmup_steps: 1000\nmax_steps: 2\n")
    assert run(rejections, "--model", base, "-o", "run", *words.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert re.search(problem, err[-1])


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ("[q_proj, q_porj]", "lora_targets: 'q_porj' is no layer of the model"),
        ("[lm_head]", "lora_targets: lm_head is not a linear layer of the decoder"),
        ("[q_proj, input_layernorm]", r"lora_targets: .*input_layernorm is not a linear layer of the decoder"),
        ("[nothing]", "lora_targets: 'nothing' is no layer of the model"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(
    targets: str, problem: str, base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(f"lora_targets: {targets}\n")
    assert run(rejections, "--model", base, "-o", "run", "--config", "run.yaml") in (1, 2)
    assert re.search(problem, capsys.readouterr().err)


def test_records_are_cut_at_the_models_longest_context(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-o", "run", "--max-steps", 1, "--max-length", 5000)
    assert run(rejections, "--model", base, *words) == 0
    assert "records are cut at 512 tokens: the model has no longer context" in capsys.readouterr().err


def test_weights_that_are_not_numbers_are_named(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, "damaged")
    weights = load_file("damaged/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = float("nan")
    save_file(weights, "damaged/model.safetensors", {"format": "pt"})
    assert run(rejections, "--model", "damaged", "-o", "run") == 1
    err = capsys.readouterr().err
    assert "damaged" in err
    assert "up_proj" in err
    assert "nan" not in err.lower().replace("nan or infinity", "")
    assert not Path("run/run.json").exists()


def test_a_launcher_that_contradicts_itself_is_refused_before_anything_is_written(
    base: Path, rejections: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(rejections, "--model", base, "-o", "run") == 2
    assert "WORLD_SIZE says that 2 processes were started, and RANK is not set" in capsys.readouterr().err
    assert not Path("run").exists()


# --- names


def test_a_name_in_brackets_is_used_as_it_is(base: Path, rejections: Path) -> None:
    shutil.copytree(base, "[red]base[")
    assert run(rejections, "--model", "[red]base[", "-o", "[bold]run", "--max-steps", 1) == 0
    assert Path("[bold]run/run.json").exists()


@pytest.mark.parametrize("words", [("-o", ""), ("--output=",), ("-o", "run", "--config", "")])
def test_an_empty_value_is_refused(
    words: tuple[str, ...], base: Path, rejections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path.cwd().iterdir())
    assert run(rejections, "--model", base, *words) == 2
    assert "is empty: give a value" in capsys.readouterr().err
    assert sorted(Path.cwd().iterdir()) == before


def test_the_package_of_the_command_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "buleyean_rl.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
