"""A training run from records file to run folder: what it leaves, and the same bytes for the same seed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from runs import adapter_bytes, logged_steps, start
from safetensors.torch import load_file

from buleyean_rl.errors import TrainingError
from buleyean_rl.training import run as training
from buleyean_rl.training.report import RunReport

REPORT_KEYS = {
    *("model", "objective", "records", "records_sha256", "steps", "tokens"),
    *("loss_start", "loss_final", "loss_floor", "optimality_gap", "optimality_gap_relative"),
    *("drift", "seconds", "tokens_per_second", "peak_rss_bytes", "versions", "config"),
}


class Finished:
    """A finished run, what it returned and what it printed."""

    def __init__(self, folder: Path, report: RunReport, printed: str) -> None:
        self.folder, self.report, self.printed = folder, report, printed


@pytest.fixture(scope="module", params=["complement", "published", "listwise"])
def finished(request: pytest.FixtureRequest, base: Path, rejections: Path, tmp_path_factory: Any) -> Finished:
    folder, out = tmp_path_factory.mktemp("runs") / request.param, io.StringIO()
    report = start(base, rejections, folder, objective=request.param, console=Console(file=out, width=300))
    return Finished(folder, report, out.getvalue())


# --- the run folder


def test_run_json_is_complete(finished: Finished) -> None:
    run = json.loads((finished.folder / "run.json").read_text())
    assert set(run) >= REPORT_KEYS
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


def test_the_loss_is_the_sum_of_its_parts_and_not_below_its_floor(finished: Finished) -> None:
    log, alpha = logged_steps(finished.folder), 0.9 if finished.report.objective == "complement" else 0.7
    assert finished.report.config["alpha"] == alpha
    assert [entry["step"] for entry in log] == list(range(1, 9))
    for entry in log:
        assert entry["loss"] >= entry["floor"]
        assert entry["gap"] == pytest.approx(entry["loss"] - entry["floor"])
        assert entry["loss"] == pytest.approx(alpha * entry["kl"] + (1 - alpha) * entry["contrast"], rel=1e-5)
    assert finished.report.loss_final >= finished.report.loss_floor
    assert finished.report.loss_start >= finished.report.loss_floor


def test_a_run_folder_is_complete_and_has_no_pickle(finished: Finished) -> None:
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
    modes = {path.stat().st_mode for path in finished.folder.iterdir()}
    assert len(modes) == 1  # whoever may read the card may read the adapter


def test_the_adapter_names_its_base_and_all_seven_layers(finished: Finished, base: Path) -> None:
    config = json.loads((finished.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.0)
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


def test_a_run_prints_its_estimate_and_its_result(finished: Finished) -> None:
    assert "9 records to train on, 1 held out" in finished.printed
    assert "for 8 steps" in finished.printed
    assert "GB of memory" in finished.printed
    assert f"optimality gap {finished.report.optimality_gap:.4f}" in finished.printed
    assert "written to " in finished.printed
    warned = "cross-entropy towards the rejected tokens" in finished.printed
    assert warned == (finished.report.objective == "published")


def test_all_objectives_but_published_make_rejected_answers_less_likely(finished: Finished) -> None:
    change = finished.report.rejected_nll_final - finished.report.rejected_nll_base
    assert (change > 0) == (finished.report.objective != "published")


# --- the same bytes


def test_the_same_seed_gives_the_same_adapter(
    uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    start(base, rejections, tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(uninterrupted)
    start(base, rejections, tmp_path / "other", seed=43)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(uninterrupted)


def test_a_scaled_adapter_is_the_trained_one_times_its_scale(
    uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    report = start(base, rejections, tmp_path / "scaled", adapter_scale=1.5)
    unscaled = json.loads((uninterrupted / "run.json").read_text())
    trained, scaled = (load_file(run / "adapter_model.safetensors") for run in (uninterrupted, tmp_path / "scaled"))
    for name, tensor in trained.items():
        torch.testing.assert_close(scaled[name], tensor * (1.5 if "lora_B" in name else 1), atol=0, rtol=0)
    # the loss is the trained adapter's, NLL and drift are the scaled one's
    assert (report.loss_final, report.optimality_gap) == (unscaled["loss_final"], unscaled["optimality_gap"])
    assert report.rejected_nll_final > unscaled["rejected_nll_final"] > report.rejected_nll_base
    assert all(report.drift[kind]["kl"] > drift["kl"] for kind, drift in unscaled["drift"].items())
    assert (report.adapter_scale, unscaled["adapter_scale"]) == (1.5, 1)
    assert "scaled by 1.5" in (tmp_path / "scaled" / "README.md").read_text()


def test_an_unchanged_adapter_is_an_error(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_adapter_checksum", lambda _: 0)
    with pytest.raises(TrainingError, match="left the adapter exactly as it was"):
        start(base, rejections, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
