"""One training run: a records file in, a run folder out.

    records --tokenise--> boundaries --split, measure--> train --measure--> adapter, run.json, loss.png, README.md

`settings.json` is written first and says what the run is; `run.json` is written last and says that it
ended. Between the two lie checkpoints, from which a killed run goes on to the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerState, set_seed

from buleyean_rl import demo_data
from buleyean_rl.boundary import Boundary, encode_prompts
from buleyean_rl.cache import cache_folder, kept, key_of, make_room
from buleyean_rl.engines import TransformersEngine
from buleyean_rl.errors import RecordError, TrainingError, UsageError
from buleyean_rl.estimate import KeepMemory, estimate
from buleyean_rl.evaluate import HeldOut, mean_nll, neutral_boundary
from buleyean_rl.guard import SOUND, Guard, Limits, Look
from buleyean_rl.json_file import write_json
from buleyean_rl.lora import lora_config, strengthen
from buleyean_rl.losses import Objective
from buleyean_rl.mine import add_own_samples
from buleyean_rl.models import (
    attach_lora,
    fingerprint,
    load_to_compute,
    load_tokenizer,
    output_head,
    resolve,
)
from buleyean_rl.progress import ShowProgress
from buleyean_rl.records import read_records, records_sha256, write_records
from buleyean_rl.reference import ReferenceCache, kept_of_node
from buleyean_rl.report import RunReport, library_versions, peak_rss_bytes, write_report
from buleyean_rl.tokenised import BoundaryFile, tokenise
from buleyean_rl.trainer import (
    BuleyeanConfig,
    BuleyeanTrainer,
    discard_checkpoints,
    last_checkpoint,
    row_limit,
)

REFERENCES_BYTES = 4 << 30  # of disk, all runs together
LIKELY = 0.7  # nats: a token that the base gives a half
MEASURED_RECORDS = 32  # enough to see a gap, few enough not to be waited for
NEUTRAL_TOKENS = 128
OWN_SAMPLES = "with-own-samples.jsonl"
SAMPLED_AT_ONCE = 32
OWN_SETTINGS = (
    *("objective", "alpha", "tau", "beta", "own_samples", "max_length", "row_tokens", "held_out", "guard", "guard_kl"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "strength"),
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
    if config.loss.of_answers and config.own_samples:
        base = _load(model_name, config.device, console)
        records_path = _add_own_samples(records_path, folder, skip_bad, base, tokenizer, config, console)
        sha256, skip_bad = records_sha256(records_path), False
    boundaries = _boundaries(records_path, sha256, skip_bad, tokenizer, config, console)
    parts = split(len(boundaries), config.held_out, config.seed)
    training, held_out = (boundaries.select(places) for places in parts)
    console.print(_data_line(boundaries.data, len(training), len(held_out)))

    set_seed(config.seed)
    model = _adapted(base or _load(model_name, config.device, console), config, settings["model"])
    decisive, progress = _decisive(config, model, model_name), ShowProgress(console)
    references = _references(decisive, sha256, config, model, training)
    trainer = BuleyeanTrainer(model, config, training, tokenizer, [progress, *callbacks], references)
    looked_at = (held_out or training)[:MEASURED_RECORDS]
    measured, neutral = HeldOut(model, looked_at, config.loss), _neutral(tokenizer, config.max_length)
    guard = _guard(trainer, tokenizer, neutral, training, folder) if config.guard else None
    with console.status("measuring the base model"):
        start = _measure_base(model, measured, neutral, guard, decisive)
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
        final, strength = measured.measure(), 1.0
        if config.strength != 1 and (guard is None or not guard.reason):
            strength = _strengthen(model, trainer, guard, console)
        if strength != 1:
            final["rejected_nll"] = measured.measure()["rejected_nll"]
        final["neutral_nll"] = mean_nll(model, neutral)

    trainer.save_model(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    report = _report(settings, config, model, trainer, boundaries.data, len(training), len(held_out), start, final)
    report = replace(report, guard=guard.report() if guard is not None else None, strength=strength)
    write_report(folder, report, trainer.state.log_history)
    discard_checkpoints(folder)
    for name in ("settings.json", SOUND, OWN_SAMPLES):
        (folder / name).unlink(missing_ok=True)
    console.print(_result_lines(report))
    return report


def asks_for_little(boundaries: Sequence[Boundary], nats: float, objective: Objective) -> bool:
    """Whether answers are so likely that their only rejection hardly moves the target.

    Args:
        boundaries: some of what is trained on.
        nats: a token of what is rejected has under the base model.
        objective: what is trained with.
    """
    by_token = objective.uses_reference and not objective.of_answers
    return by_token and objective.tau <= 1 and nats < LIKELY and all(boundary.rounds == 1 for boundary in boundaries)


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep a random share of some records from training.

    Args:
        count: how many records there are; at least one.
        share: to hold out; at least one record is always left to train on.
        seed: decides which.

    Returns:
        The numbers of the records to train on and of those held out, each in ascending order.
    """
    chosen = np.zeros(count, dtype=bool)
    chosen[random.Random(seed).sample(range(count), min(int(count * share), count - 1))] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _boundaries(
    path: Path, sha256: str, skip_bad: bool, tokenizer: Any, config: BuleyeanConfig, console: Console
) -> BoundaryFile:
    """The records that can be trained on, tokenised; at least one."""
    # A file that is good only without its bad lines must not count as good.
    source = f"{sha256} without bad lines" if skip_bad else sha256
    with console.status("tokenising") as status:
        boundaries = tokenise(
            read_records(path, skip_bad=skip_bad),
            source,
            tokenizer,
            config.max_length,
            progress=lambda count: status.update(f"tokenising: {count:,} records"),
        )
    if not boundaries:
        raise RecordError(
            f"none of the {boundaries.data['read']} records can be trained on: no prompt leaves room for a response in "
            f"{config.max_length} tokens; raise --max-length",
            path=path,
        )
    return _with_a_choice(boundaries, path) if config.loss.of_answers else boundaries


def _load(model_name: str, device: torch.device, console: Console) -> Any:
    with console.status(f"loading {model_name}"):
        return load_to_compute(model_name, device)


def _adapted(base: Any, config: BuleyeanConfig, name: str) -> Any:
    """A base model with a fresh adapter that says whose it is."""
    adapter = lora_config(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    model = attach_lora(base, adapter)
    model.peft_config["default"].base_model_name_or_path = name
    return model.to(config.device)


def _add_own_samples(
    path: Path,
    folder: Path,
    skip_bad: bool,
    base: Any,
    tokenizer: Any,
    config: BuleyeanConfig,
    console: Console,
) -> Path:
    """The records with answers of the base model's own beside the rejected ones, in a file of the run folder."""
    file = folder / OWN_SAMPLES
    if not file.exists():
        records = list(read_records(path, skip_bad=skip_bad))
        prompts = encode_prompts(tokenizer, [record.prompt for record in records])
        fits = [len(prompt) < config.max_length for prompt in prompts]  # the others are dropped, and said to be
        engine = TransformersEngine(base, tokenizer, batch=SAMPLED_AT_ONCE)
        with console.status("drawing the base model's own answers") as status:
            grown = iter(
                add_own_samples(
                    list(compress(records, fits)),
                    engine,
                    config.own_samples,
                    config.seed,
                    lambda done: status.update(f"drawing the base model's own answers: {done:,}"),
                )
            )
        write_records(file, (next(grown) if fit else record for record, fit in zip(records, fits, strict=True)))
    return file


def _with_a_choice(boundaries: BoundaryFile, path: Path) -> BoundaryFile:
    """The records with at least two different answers: one alone cannot be ranked."""
    places = [place for place, boundary in enumerate(boundaries) if len(set(boundary.ends)) > 1]
    if not places:
        raise RecordError("no record has two answers to rank: raise own_samples, or train another objective", path=path)
    return boundaries.select(np.array(places))


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
    model: Any, measured: HeldOut, neutral: Sequence[Boundary], guard: Guard | None, decisive: Sequence[Any]
) -> dict[str, float]:
    """The loss and the nats of held-out rejections and neutral texts, before training; what no record decides, once."""
    same = [*decisive, [text.prompt + text.tokens for text in neutral]]
    if guard is not None:
        guard.base = Look(**kept("look", [*same, guard.looks_at], lambda: asdict(guard.look_at_base())))
    return measured.measure() | kept("neutral", same, lambda: {"neutral_nll": mean_nll(model, neutral)})


def _announce(
    trainer: BuleyeanTrainer, training: BoundaryFile, seen: Sequence[Boundary], nats: float, console: Console
) -> None:
    """Say what the run will take, and hold it to that."""
    need = estimate(trainer, training)
    console.print(str(need))
    if asks_for_little(seen, nats, trainer.args.loss):
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


def _strengthen(model: Any, trainer: BuleyeanTrainer, guard: Guard | None, console: Console) -> float:
    """Make more, or less, of what was trained, unless the guard objects to what comes out; returns the strength."""
    strength: float = trainer.args.strength
    strengthen(model, strength)
    if guard is None or not (objection := guard.objection(trainer.state.global_step)):
        return strength
    guard.restore()
    console.print(f"[yellow]the adapter is kept as it was trained:[/] at strength {strength:g} {objection}")
    return 1.0


def _stable_name(model_name: str) -> str:
    """The model's name, good from any folder."""
    resolve(model_name)
    path = Path(model_name).expanduser()
    return str(path.resolve()) if path.exists() else model_name


def _open_run(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Claim the run folder; returns the checkpoint to go on from."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the run")
    file = folder / "settings.json"
    if (folder / "run.json").exists():
        raise UsageError(f"{folder} already holds a finished run: name another folder, or delete this one")
    if not resume:
        if file.exists() and last_checkpoint(folder) is not None:
            raise UsageError(f"{folder} holds an unfinished run: go on with --resume, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return None
    if not file.exists():
        raise UsageError(f"nothing to resume in {folder}: start it without --resume")
    earlier = json.loads(file.read_text())
    differing = [name for name in ("model", "records_sha256") if earlier[name] != settings[name]] + [
        f"{name} ({earlier['config'].get(name)} then, {value} now)"
        for name, value in settings["config"].items()
        if earlier["config"].get(name) != value
    ]
    if differing:
        raise UsageError(f"cannot resume {folder} with other settings: {', '.join(differing)}")
    checkpoint = last_checkpoint(folder)
    discard_checkpoints(folder, keep=checkpoint)  # a half one would confuse the rotation
    return checkpoint


def _decisive(config: BuleyeanConfig, model: Any, model_name: str) -> list[Any]:
    """All that decides, to the last bit, what is computed with a base model here."""
    return [
        *(fingerprint(model_name), str(model.dtype), sorted(library_versions().items())),
        *(str(config.device), torch.get_num_threads()),
    ]


def _references(
    decisive: Sequence[Any], sha256: str, config: BuleyeanConfig, model: Any, training: BoundaryFile
) -> ReferenceCache | None:
    """What is kept of the reference, if records are met more than once and there is room: all there is, or its states.

    It depends, in its last bits, on what was computed with it; so its folder's name depends on all that decides it.
    """
    steps_an_epoch = len(training) / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    epochs = config.max_steps / steps_an_epoch if config.max_steps > 0 else config.num_train_epochs
    if epochs <= 1 or not config.loss.uses_reference:
        return None
    all_there_is, nodes = kept_of_node(output_head(model), config.loss), int(training.nodes.sum())
    choices = (all_there_is, all_there_is._replace(with_rest=False))
    kept = next((kept for kept in choices if nodes * kept.bytes <= REFERENCES_BYTES), None)
    if kept is None:
        return None
    made_from = [
        *(*decisive, sha256, config.loss.of_answers, row_limit(config, model)),
        *(config.max_length, config.held_out, config.seed, config.data_seed, config.per_device_train_batch_size),
        kept.with_rest,
    ]
    references = cache_folder() / "reference"
    folder = references / key_of(made_from)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    make_room(references, REFERENCES_BYTES - nodes * kept.bytes)
    return ReferenceCache(folder, training.nodes.tolist(), kept)


def _plain(value: Any) -> Any:
    return str(value.value) if hasattr(value, "value") else value


def _neutral(tokenizer: Any, max_length: int) -> list[Boundary]:
    length = min(NEUTRAL_TOKENS, max_length)
    texts = (neutral_boundary(tokenizer, text, length) for text in demo_data.neutral_texts())
    return [boundary for boundary in texts if boundary is not None]


def _fingerprint(model: Any) -> int:
    """A number that changes when any trained weight does."""
    return hash(tuple(p.detach().double().sum().item() for p in model.parameters() if p.requires_grad))


def _report(
    settings: dict[str, Any],
    config: BuleyeanConfig,
    model: Any,
    trainer: BuleyeanTrainer,
    data: dict[str, int],
    training: int,
    held_out: int,
    start: dict[str, float],
    final: dict[str, float],
) -> RunReport:
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    tokens, training_seconds = (sum(entry[key] for entry in log) for key in ("tokens", "seconds"))
    tail = log[-max(1, len(log) // 10) :]
    gap, gap_start = final["loss"] - final["floor"], start["loss"] - start["floor"]
    parameters = {"base": 0, "adapter": 0}
    for parameter in model.parameters():
        parameters["adapter" if parameter.requires_grad else "base"] += parameter.numel()
    return RunReport(
        model=settings["model"],
        objective=config.objective,
        records=training,
        records_held_out=held_out,
        records_sha256=settings["records_sha256"],
        steps=trainer.state.global_step,
        tokens=int(tokens),
        loss_start=start["loss"],
        loss_final=final["loss"],
        loss_floor=final["floor"],
        optimality_gap=gap,
        optimality_gap_relative=gap / gap_start if gap_start > 0 else None,
        loss_training=sum(entry["loss"] for entry in tail) / len(tail),
        rejected_nll_base=start["rejected_nll"],
        rejected_nll_final=final["rejected_nll"],
        neutral_nll_base=start["neutral_nll"],
        neutral_nll_final=final["neutral_nll"],
        seconds=training_seconds,
        tokens_per_second=tokens / training_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        device=_device_name(config),
        parameters=parameters,
        data=data,
        versions=library_versions(),
        config=settings["config"],
    )


def _device_name(config: BuleyeanConfig) -> str:
    if config.device.type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{config.device.type}, {torch.get_num_threads()} threads"


def _data_line(data: dict[str, int], training: int, held_out: int) -> str:
    parts = [f"{training:,} record{'s' * (training != 1)} to train on, {held_out:,} held out"]
    if data["dropped"]:
        parts.append(f"{data['dropped']:,} dropped: no room for a response, or nothing in it")
    if data["truncated_responses"]:
        parts.append(f"{data['truncated_responses']:,} responses cut")
    return "; ".join(parts)


def _result_lines(report: RunReport) -> str:
    lines = [
        f"loss {report.loss_start:.4f} -> {report.loss_final:.4f}, floor {report.loss_floor:.4f}, "
        f"optimality gap {report.optimality_gap:.4f} nats",
        f"rejected answers {report.rejected_nll_base:.3f} -> {report.rejected_nll_final:.3f} nats per token, "
        f"neutral text {report.neutral_nll_base:.3f} -> {report.neutral_nll_final:.3f}",
    ]
    if report.rejected_nll_final <= report.rejected_nll_base:
        lines.append("[yellow]warning:[/] the rejected answers did not become less likely")
    return "\n".join(lines)
