"""A training run from records file to run folder: repeatable, killable, honest about what it did."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from buleyean_rl.data.records import RejectionRecord, make_record, write_records
from buleyean_rl.data.trie import merge_responses
from buleyean_rl.errors import ModelError, RecordError, TrainingError, UsageError
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training import dataset, measure, reference_cache
from buleyean_rl.training import run as training
from buleyean_rl.training.config import load_config
from buleyean_rl.training.dataset import split_records
from buleyean_rl.training.reference_cache import EntryFormat
from buleyean_rl.training.report import RunReport
from buleyean_rl.training.run import hardly_moves_target, train
from tiny import tiny_tokenizer

SECTION_5 = {
    *("model", "objective", "records", "records_sha256", "steps", "tokens"),
    *("loss_start", "loss_final", "loss_floor", "optimality_gap", "optimality_gap_relative"),
    *("neutral_nll_base", "neutral_nll_final", "seconds", "tokens_per_second", "peak_rss_bytes", "versions", "config"),
}

# Eight steps of two records: the ninth record starts a second epoch, so a resumed run must find its place in it.
SETTINGS = {"max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 0.25, "learning_rate": 1e-2, "guard": False}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_NEUTRAL_TOKENS", 8)


def start(base: Path, records: Path, run: Path, *, resume: bool = False, **settings: Any) -> RunReport:
    return train(records, str(base), load_config(None, run, SETTINGS | settings), resume=resume)


def adapter(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def steps(run: Path) -> list[dict[str, float]]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "floor" in entry]


class Finished:
    """A finished run, what it returned and what it printed."""

    def __init__(self, folder: Path, report: RunReport, printed: str) -> None:
        self.folder, self.report, self.printed = folder, report, printed


@pytest.fixture(scope="module", params=["complement", "published", "listwise"])
def finished(request: pytest.FixtureRequest, base: Path, rejections: Path, tmp_path_factory: Any) -> Finished:
    folder, out = tmp_path_factory.mktemp("runs") / request.param, io.StringIO()
    config = load_config(None, folder, SETTINGS | {"objective": request.param})
    report = train(rejections, str(base), config, console=Console(file=out, width=300))
    return Finished(folder, report, out.getvalue())


@pytest.fixture(scope="module")
def uninterrupted(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    start(base, rejections, folder)
    return folder


# --- what a run leaves


def test_run_json_says_everything(finished: Finished) -> None:
    run = json.loads((finished.folder / "run.json").read_text())
    assert set(run) >= SECTION_5
    assert (run["objective"], run["steps"], run["records"], run["records_held_out"]) == (
        finished.folder.name,
        8,
        9,
        1,
    )
    assert run["optimality_gap"] == pytest.approx(run["loss_final"] - run["loss_floor"])
    relative = run["optimality_gap"] / (run["loss_start"] - run["loss_floor"])
    assert run["optimality_gap_relative"] == pytest.approx(relative)
    assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
    assert run["config"]["lora_rank"] == 16
    assert {"python", "torch", "transformers", "peft", "buleyean-rl"} <= set(run["versions"])
    assert run["format"] == 2
    assert f"compute: {run['compute']}" in finished.printed


def test_the_loss_is_its_parts_and_never_below_its_floor(finished: Finished) -> None:
    log, alpha = steps(finished.folder), 0.9 if finished.report.objective == "complement" else 0.7
    assert finished.report.config["alpha"] == alpha
    assert [entry["step"] for entry in log] == list(range(1, 9))
    for entry in log:
        assert entry["loss"] >= entry["floor"]
        assert entry["gap"] == pytest.approx(entry["loss"] - entry["floor"])
        assert entry["loss"] == pytest.approx(alpha * entry["kl"] + (1 - alpha) * entry["contrast"], rel=1e-5)
    assert finished.report.loss_final >= finished.report.loss_floor
    assert finished.report.loss_start >= finished.report.loss_floor


def test_a_run_folder_is_whole_and_holds_no_pickle(finished: Finished) -> None:
    names = {path.name for path in finished.folder.rglob("*")}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "trainer_state.json",
        "run.json",
        "loss.png",
        "README.md",
    } == names
    for path in finished.folder.iterdir():  # a pickle, or the zip torch keeps one in
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_the_adapter_names_its_base_and_all_seven_layers(finished: Finished, base: Path) -> None:
    config = json.loads((finished.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    adapted = {name.split(".")[-3] for name in load_file(finished.folder / "adapter_model.safetensors")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_model_card_has_a_header_and_the_numbers(finished: Finished, base: Path) -> None:
    card = (finished.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft"
    assert "base_model" not in header  # a folder of this machine is nobody else's base model
    assert str(base) not in card
    for number in (finished.report.loss_final, finished.report.loss_floor, finished.report.optimality_gap):
        assert f"{number:.4f}" in card


def test_the_run_says_what_it_will_take_and_what_came_out(finished: Finished) -> None:
    assert "9 records to train on, 1 held out" in finished.printed
    assert "for 8 steps" in finished.printed
    assert "GB of memory" in finished.printed
    assert f"optimality gap {finished.report.optimality_gap:.4f}" in finished.printed
    warned = "cross-entropy towards the rejected tokens" in finished.printed
    assert warned == (finished.report.objective == "published")


def test_all_but_published_make_rejected_answers_unlikelier(finished: Finished) -> None:
    change = finished.report.rejected_nll_final - finished.report.rejected_nll_base
    assert (change > 0) == (finished.report.objective != "published")


def test_a_single_rejection_of_likely_answers_barely_moves_the_target() -> None:
    once, often = (merge_responses([1], [([5, 6], [True, True])], [rounds], rounds) for rounds in (1, 60))
    assert hardly_moves_target([once, once], 0.24, Objective())
    assert not hardly_moves_target([once], 1.68, Objective())
    assert not hardly_moves_target([once, often], 0.24, Objective())
    assert not hardly_moves_target([once], 0.24, Objective(tau=6.0))
    assert not hardly_moves_target([once], 0.24, Objective("published"))
    assert not hardly_moves_target([once], 0.24, Objective("listwise"))


# --- the same bytes, whatever happens


def test_one_seed_one_adapter(uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path) -> None:
    start(base, rejections, tmp_path / "again")
    assert adapter(tmp_path / "again") == adapter(uninterrupted)
    start(base, rejections, tmp_path / "other", seed=43)
    assert adapter(tmp_path / "other") != adapter(uninterrupted)


def test_a_scaled_adapter_is_the_trained_one_times_its_scale(
    uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    report = start(base, rejections, tmp_path / "scaled", adapter_scale=1.5)
    plain = json.loads((uninterrupted / "run.json").read_text())
    once, more = (load_file(run / "adapter_model.safetensors") for run in (uninterrupted, tmp_path / "scaled"))
    for name, tensor in once.items():
        torch.testing.assert_close(more[name], tensor * (1.5 if "lora_B" in name else 1), atol=0, rtol=0)
    # the loss is what training reached; what the text lost is what the scaled adapter costs
    assert (report.loss_final, report.optimality_gap) == (plain["loss_final"], plain["optimality_gap"])
    assert report.rejected_nll_final > plain["rejected_nll_final"] > report.rejected_nll_base
    assert report.neutral_nll_final != plain["neutral_nll_final"]
    assert (report.adapter_scale, plain["adapter_scale"]) == (1.5, 1)
    assert "scaled by 1.5" in (tmp_path / "scaled" / "README.md").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path

import torch
from buleyean_rl.training import measure
from buleyean_rl.training import run as training
from buleyean_rl.training.config import load_config
from buleyean_rl.training.trainer import BuleyeanTrainer

measure.MAX_NEUTRAL_TOKENS = 8
records, base, run, settings, where = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

log, save = BuleyeanTrainer.log, torch.save

def log_and_die(self, logs, *args):
    log(self, logs, *args)
    if where == f"after step {self.state.global_step}":
        die()

def half_save(value, path, *args, **kwargs):
    if where == "within a checkpoint" and "checkpoint-6" in str(path):
        Path(path).write_bytes(b"half a file")
        die()
    save(value, path, *args, **kwargs)

BuleyeanTrainer.log, torch.save = log_and_die, half_save
training.train(Path(records), base, load_config(None, Path(run), eval(settings)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after step 1", "after step 7", "within a checkpoint"])
def test_killed_and_resumed_is_never_killed(
    where: str, uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [str(rejections), str(base), str(run), repr(SETTINGS), where]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "run.json").exists()
    left = {path.name for path in run.glob("checkpoint-*")}
    assert (
        left
        == {
            "after step 1": set(),
            "after step 7": {"checkpoint-6"},
            "within a checkpoint": {"checkpoint-4", "checkpoint-6"},
        }[where]
    )
    start(base, rejections, run, resume=True)
    assert adapter(run) == adapter(uninterrupted)
    assert [entry["step"] for entry in steps(run)] == list(range(1, 9))
    assert not list(run.glob("checkpoint-*"))


# --- what is refused


@pytest.fixture
def stopped(base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its third step."""
    run = tmp_path / "stopped"
    log = training.BuleyeanTrainer.log

    def interrupt(self: Any, logs: dict[str, float], *args: Any) -> None:
        log(self, logs, *args)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.BuleyeanTrainer, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(base, rejections, run)
    return run


def test_an_interrupted_run_goes_on_only_as_it_was(
    stopped: Path,
    uninterrupted: Path,
    base: Path,
    rejections: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="has an unfinished run: resume it with --resume, or delete it"):
        start(base, rejections, stopped)
    with pytest.raises(UsageError, match=r"other settings: learning_rate \(0.01 then, 0.1 now\)"):
        start(base, rejections, stopped, resume=True, learning_rate=0.1)
    with pytest.raises(UsageError, match=r"other settings: objective \(complement then, published now\)"):
        start(base, rejections, stopped, resume=True, objective="published")
    others = tmp_path / "others.jsonl"
    write_records(others, [make_record("Hi", ["No"])])
    with pytest.raises(UsageError, match="other settings: records_sha256"):
        start(base, others, stopped, resume=True)
    with pytest.raises(UsageError, match="other settings: model"):
        start(Path("org/other"), rejections, stopped, resume=True)
    warned: list[str] = []
    monkeypatch.setattr("transformers.trainer_utils.logger.warning_once", warned.append)
    start(base, rejections, stopped, resume=True)
    # transformers' own word on file systems whose times are equal depends on the machine; nothing else is warned of
    assert [warning for warning in warned if "mtime" not in warning] == []
    assert adapter(stopped) == adapter(uninterrupted)


def test_a_run_that_an_earlier_version_began_is_not_resumed(stopped: Path, base: Path, rejections: Path) -> None:
    file = stopped / "settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("format") == 2
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"settings\.json is of format 1, whose objective names mean other losses"):
        start(base, rejections, stopped, resume=True)


def test_a_finished_run_is_left_alone(uninterrupted: Path, base: Path, rejections: Path) -> None:
    before = adapter(uninterrupted)
    for resume in (False, True):
        with pytest.raises(UsageError, match="already has a finished run"):
            start(base, rejections, uninterrupted, resume=resume)
    assert adapter(uninterrupted) == before


def test_nothing_to_resume(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to resume in .*: start it without --resume"):
        start(base, rejections, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_run_folder(base: Path, rejections: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file: name a folder for the run"):
        start(base, rejections, tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        start(base, rejections, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_stops_the_run_at_once(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only folder does for anyone but root."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "run")

    monkeypatch.setattr("buleyean_rl.training.checkpoints.write_json", denied)
    monkeypatch.setattr("buleyean_rl.models.model.load_for_inference", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PermissionError):
        start(base, rejections, tmp_path / "run")


def test_records_that_are_all_too_long(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none of the 10 records can be trained on: .* raise --max-length"):
        start(base, rejections, tmp_path / "run", max_length=5)


def test_a_run_that_failed_before_its_first_step_can_be_started_again(
    base: Path, rejections: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rejections.read_text() + "{\n")
    with pytest.raises(RecordError, match=r"broken.jsonl:11: "):
        start(base, broken, tmp_path / "run")
    assert start(base, rejections, tmp_path / "run").steps == 8


def test_an_adapter_that_did_not_change_is_an_error(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="left the adapter exactly as it was"):
        start(base, rejections, tmp_path / "run", learning_rate=1e-300)
    assert not (tmp_path / "run" / "run.json").exists()


# --- what goes in


def test_long_and_hopeless_records_are_counted(base: Path, rejections: Path, tmp_path: Path) -> None:
    records = tmp_path / "mixed.jsonl"
    lines = rejections.read_text().splitlines()
    tokenizer = tiny_tokenizer()
    write_records(tmp_path / "odd.jsonl", [make_record("Hi", [""]), make_record("a " * 200, ["No"])])
    long = "talk it through " * 30
    write_records(tmp_path / "long.jsonl", [make_record("Hi", [long, "No"])])
    records.write_text(
        "\n".join([*lines, (tmp_path / "odd.jsonl").read_text() + (tmp_path / "long.jsonl").read_text()])
    )
    assert len(tokenizer(long).input_ids) > 64
    report = start(base, records, tmp_path / "run", max_length=64, held_out=0, max_steps=2)
    assert report.data == {"read": 13, "dropped": 2, "truncated_responses": 1}
    assert (report.records, report.records_held_out) == (11, 0)


def test_bad_lines_can_be_skipped(base: Path, rejections: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rejections.read_text() + "{\n")
    config = load_config(None, tmp_path / "run", SETTINGS | {"max_steps": 2})
    assert train(broken, str(base), config, skip_bad=True).data["read"] == 10


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 9))
def test_split_has_every_record_once_and_one_to_train_on(count: int, share: float, seed: int) -> None:
    training, held_out = split_records(count, share, seed)
    assert sorted([*training, *held_out]) == list(range(count))
    assert len(training) >= 1
    assert len(held_out) == min(int(count * share), count - 1)
    for part, again in zip((training, held_out), split_records(count, share, seed), strict=True):
        assert part.tolist() == again.tolist() == sorted(part)


# --- what is cached


def test_the_reference_is_cached_for_the_same_answers_only(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listwise adds answers to the same records: after another objective it must give what it gives alone."""
    monkeypatch.setattr("buleyean_rl.training.own_samples.MAX_SAMPLE_TOKENS", 8)
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "objective": "listwise"}
    for cache, before in (("used", ["complement"]), ("new", [])):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        for objective in before:
            start(base, rejections, tmp_path / objective, **settings | {"objective": objective})
        start(base, rejections, tmp_path / f"listwise-{cache}", **settings)
    assert adapter(tmp_path / "listwise-used") == adapter(tmp_path / "listwise-new")


class Records:
    """Ten of ten nodes each."""

    nodes = np.full(10, 10)

    def __len__(self) -> int:
        return len(self.nodes)


@pytest.mark.parametrize(
    ("limit", "files"),
    [(4000, {"is_cached", "states", "lse", "mean"}), (3999, {"is_cached", "states"}), (1599, set())],
    ids=str,
)
def test_as_much_of_the_reference_is_cached_as_fits_on_disk(
    limit: int, files: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference_cache, "MAX_CACHE_BYTES", limit)
    monkeypatch.setattr(reference_cache, "entry_format", lambda *_: EntryFormat(4, torch.float32, True))
    config = load_config(None, tmp_path / "run", {"max_steps": -1, "num_train_epochs": 2, "micro_batch_tokens": 64})
    model: Any = SimpleNamespace(head=None, module=None, numerics_key=[])
    data: Any = SimpleNamespace(training=Records(), sha256="")
    references = reference_cache.open_reference_cache(model, data, config)
    assert (references is None) == (not files)
    assert {path.name for path in tmp_path.rglob("reference/*/*")} == files
    config.num_train_epochs = 1
    assert reference_cache.open_reference_cache(model, data, config) is None


def test_nothing_is_drawn_for_a_prompt_without_room(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def draw(records: list[RejectionRecord], *_: Any) -> list[RejectionRecord]:
        asked.extend(str(record.prompt) for record in records)
        return [make_record(record.prompt, ["No.", "Sleep well."], [1, 0], 1) for record in records]

    monkeypatch.setattr(dataset, "add_own_samples", draw)
    file = tmp_path / "records.jsonl"
    write_records(file, [make_record(prompt, ["No."], [1], 1) for prompt in ("Hi", "long " * 200, "Tip?")])
    run = tmp_path / "run"
    report = start(base, file, run, objective="listwise", held_out=0.0, max_length=64)
    assert asked == ["Hi", "Tip?"]
    assert report.records == 2
