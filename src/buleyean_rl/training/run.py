"""One training run: a records file in, a run folder out.

    records --tokenise--> boundaries --split, measure--> train --measure--> adapter, run.json, loss.png, README.md

`settings.json` is written first and says what the run is; `run.json` is written last and says that it
ended. Between the two lie checkpoints, from which a killed run goes on to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerState, set_seed

from buleyean_rl import demo_data
from buleyean_rl.data.records import records_sha256
from buleyean_rl.data.token_store import BoundaryFile
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import TrainingError
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.compute import load_for_inference
from buleyean_rl.models.lora import lora_config, scale_adapter
from buleyean_rl.models.source import resolve
from buleyean_rl.models.weights import load_tokenizer
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.system.cache import memoize_to_disk
from buleyean_rl.training.checkpoints import _open_run, discard_checkpoints
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import OWN_SAMPLES, _add_own_samples, _boundaries, split
from buleyean_rl.training.estimate import KeepMemory, estimate
from buleyean_rl.training.guard import SOUND, DriftCheck, Guard, Limits
from buleyean_rl.training.held_out import HeldOut
from buleyean_rl.training.progress import ShowProgress
from buleyean_rl.training.reference_cache import _references, numerics_key
from buleyean_rl.training.report import RunReport, _data_line, _report, _result_lines, write_report
from buleyean_rl.training.trainer import BuleyeanTrainer

LIKELY = 0.7  # nats: a token that the base gives a half
MEASURED_RECORDS = 32  # enough to see a gap, few enough not to be waited for
NEUTRAL_TOKENS = 128
OWN_SETTINGS = (
    *(
        "objective",
        "alpha",
        "tau",
        "beta",
        "own_samples",
        "max_length",
        "micro_batch_tokens",
        "held_out",
        "guard",
        "guard_kl",
    ),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "adapter_scale"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing"),
    *("num_train_epochs", "max_steps"),
)
PUBLISHED_WARNING = (
    "[yellow]warning:[/] the published contrast is a cross-entropy towards the rejected tokens, and its target spreads "
    "over the whole vocabulary: expect damaged text. It is here to reproduce the published numbers; leave out "
    "--objective to learn from rejections."
)


def train(
    records_path: Path | str,
    model_name: str,
    config: BuleyeanConfig,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> RunReport:
    """Train an adapter on a records file and write the run folder.

    Args:
        records_path: the rejections.
        model_name: the base model, see `models.resolve`.
        config: the settings; `config.output_dir` is the run folder.
        resume: go on with a run that was killed.
        skip_bad: leave out malformed records instead of stopping at the first.
        callbacks: told of every step, as by `Trainer`.
        console: where progress goes; None for nowhere.

    Returns:
        What `run.json` holds.

    Raises:
        RecordError: the records cannot be used.
        ModelError: the model cannot be used.
        TrainingError: training failed or changed nothing.
        UsageError: the run folder is not fit for this.
    """
    console, records_path = console or Console(quiet=True), Path(records_path)
    folder, sha256 = Path(str(config.output_dir)), records_sha256(records_path)
    settings: dict[str, Any] = {
        "model": _stable_name(model_name),
        "records_sha256": sha256,
        "config": {name: _plain(getattr(config, name)) for name in OWN_SETTINGS},
    }
    checkpoint = _open_run(folder, settings, resume)
    if checkpoint:  # the state has a number where the settings have a share, of which transformers would warn
        config.save_steps = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).save_steps
    if config.objective == "published":
        console.print(PUBLISHED_WARNING)
    tokenizer, base = load_tokenizer(model_name), None
    if config.loss.is_listwise and config.own_samples:
        base = _load(model_name, config.device, console)
        records_path = _add_own_samples(records_path, folder, skip_bad, base, tokenizer, config, console)
        sha256, skip_bad = records_sha256(records_path), False
    boundaries = _boundaries(records_path, sha256, skip_bad, tokenizer, config, console)
    parts = split(len(boundaries), config.held_out, config.seed)
    training, held_out = (boundaries.select(places) for places in parts)
    console.print(_data_line(boundaries.data, len(training), len(held_out)))

    set_seed(config.seed)
    model = _adapted(base or _load(model_name, config.device, console), config, settings["model"])
    numerics, progress = numerics_key(config, model, model_name), ShowProgress(console)
    references = _references(numerics, sha256, config, model, training)
    trainer = BuleyeanTrainer(model, config, training, tokenizer, [progress, *callbacks], references)
    looked_at = (held_out or training)[:MEASURED_RECORDS]
    measured, neutral = HeldOut(model, looked_at, config.loss), _neutral(tokenizer, config.max_length)
    guard = _guard(trainer, tokenizer, neutral, training, folder) if config.guard else None
    with console.status("measuring the base model"):
        start = _measure_base(model, measured, neutral, guard, numerics)
    _announce(trainer, training, looked_at, start["rejected_nll"], console)

    before = _fingerprint(model)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    if guard is not None and guard.reason:
        _say_what_ended_it(guard, console)
    if _fingerprint(model) == before:
        raise TrainingError("training left the adapter exactly as it was: raise the learning rate or the steps")
    with console.status("measuring the trained model"):
        final, scale = measured.measure(), 1.0
        if config.adapter_scale != 1 and (guard is None or not guard.reason):
            scale = _scale(model, trainer, guard, console)
        if scale != 1:
            final["rejected_nll"] = measured.measure()["rejected_nll"]
        final["neutral_nll"] = mean_nll(model, neutral)

    trainer.save_model(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    report = _report(settings, config, model, trainer, boundaries.data, len(training), len(held_out), start, final)
    report = replace(report, guard=guard.report() if guard is not None else None, adapter_scale=scale)
    write_report(folder, report, trainer.state.log_history)
    discard_checkpoints(folder)
    for name in ("settings.json", SOUND, OWN_SAMPLES):
        (folder / name).unlink(missing_ok=True)
    console.print(_result_lines(report))
    return report


def barely_moves_target(boundaries: Sequence[Boundary], nats: float, objective: Objective) -> bool:
    """Whether answers are so likely that their only rejection hardly moves the target.

    Args:
        boundaries: some of what is trained on.
        nats: a token of what is rejected has under the base model.
        objective: what is trained with.
    """
    by_token = objective.uses_reference and not objective.is_listwise
    return by_token and objective.tau <= 1 and nats < LIKELY and all(boundary.rounds == 1 for boundary in boundaries)


def _load(model_name: str, device: torch.device, console: Console) -> Any:
    with console.status(f"loading {model_name}"):
        return load_for_inference(model_name, device)


def _adapted(base: Any, config: BuleyeanConfig, name: str) -> Any:
    """A base model with a fresh adapter that says whose it is."""
    adapter = lora_config(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    model = attach_lora(base, adapter)
    model.peft_config["default"].base_model_name_or_path = name
    return model.to(config.device)


def _guard(
    trainer: BuleyeanTrainer, tokenizer: Any, neutral: Sequence[Boundary], training: BoundaryFile, folder: Path
) -> Guard:
    config: BuleyeanConfig = trainer.args
    records_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    guard = Guard(
        trainer.model,
        tokenizer,
        trainer.layout,
        trainer.head,
        neutral,
        demo_data.held_out_prompts(),
        float(training.sizes.mean()) * records_a_step,
        folder,
        Limits(kl=config.guard_kl),
    )
    trainer.add_callback(guard)
    return guard


def _measure_base(
    model: Any, measured: HeldOut, neutral: Sequence[Boundary], guard: Guard | None, numerics: Sequence[Any]
) -> dict[str, float]:
    """The loss and the nats of held-out rejections and neutral texts, before training; what no record decides, once."""
    same = [*numerics, [text.prompt + text.tokens for text in neutral]]
    if guard is not None:
        guard.base = DriftCheck(
            **memoize_to_disk("look", [*same, guard.looks_at], lambda: asdict(guard.look_at_base()))
        )
    return measured.measure() | memoize_to_disk("neutral", same, lambda: {"neutral_nll": mean_nll(model, neutral)})


def _announce(
    trainer: BuleyeanTrainer, training: BoundaryFile, seen: Sequence[Boundary], nats: float, console: Console
) -> None:
    """Say what the run will take, and hold it to that."""
    need = estimate(trainer, training)
    console.print(str(need))
    if barely_moves_target(seen, nats, trainer.args.loss):
        console.print(
            f"[yellow]note:[/] the model would say these answers itself ({nats:.2f} nats per token), "
            "so one rejection of each asks for little: --tau 6 asks as firmly as mining does"
        )
    if trainer.args.device.type == "cpu":
        trainer.add_callback(KeepMemory(need.memory_bytes))


def _say_what_ended_it(guard: Guard, console: Console) -> None:
    step = guard.looks[-1].step
    if not guard.kept:
        raise TrainingError(
            f"the guard ended the run at its first look, step {step}: {guard.reason}; lower the learning rate, or go "
            "on regardless with --no-guard"
        )
    console.print(
        f"[yellow]the guard ended the run at step {step}:[/] {guard.reason}; the adapter of step {guard.kept} is kept"
    )


def _scale(model: Any, trainer: BuleyeanTrainer, guard: Guard | None, console: Console) -> float:
    """Multiply the trained adapter, unless the guard objects to the result; returns the factor."""
    scale: float = trainer.args.adapter_scale
    scale_adapter(model, scale)
    if guard is None or not (objection := guard.objection(trainer.state.global_step)):
        return scale
    guard.restore()
    console.print(f"[yellow]the adapter is kept as it was trained:[/] scaled by {scale:g} {objection}")
    return 1.0


def _stable_name(model_name: str) -> str:
    """The model's name, good from any folder."""
    resolve(model_name)
    path = Path(model_name).expanduser()
    return str(path.resolve()) if path.exists() else model_name


def _plain(value: Any) -> Any:
    return str(value.value) if hasattr(value, "value") else value


def _neutral(tokenizer: Any, max_length: int) -> list[Boundary]:
    length = min(NEUTRAL_TOKENS, max_length)
    texts = (neutral_boundary(tokenizer, text, length) for text in demo_data.neutral_texts())
    return [boundary for boundary in texts if boundary is not None]


def _fingerprint(model: Any) -> int:
    """A number that changes when any trained weight does."""
    return hash(tuple(p.detach().double().sum().item() for p in model.parameters() if p.requires_grad))
