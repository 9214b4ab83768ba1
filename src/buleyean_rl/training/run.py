"""One training run: a records file in, a run folder out.

    records --load_dataset--> Dataset --+
                                        +--BuleyeanTrainer--> adapter --Measurement, report--> run.json, card, plot
    name --open_model, adapter--> Model-+

`settings.json` is written first and identifies the run; `run.json` is written last and marks its end. From the
checkpoints between them a killed run resumes to the same bytes. See `run_state`.

Several processes go through all of it together, see `processes`; the first one alone writes the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, TrainerState, set_seed

from buleyean_rl import demo_data
from buleyean_rl.data.records import records_sha256
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import TrainingError, UsageError
from buleyean_rl.models.lora import lora_config, scale_adapter
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.private_interfaces import use_current_gpu
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.progress import working
from buleyean_rl.training.anchors import anchor_groups
from buleyean_rl.training.before_after import Measurement
from buleyean_rl.training.checkpoints import Checkpoint
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset, RecordsFile, load_dataset
from buleyean_rl.training.estimate import estimate
from buleyean_rl.training.firmness import decide_firmness
from buleyean_rl.training.guard import Guard, Limits
from buleyean_rl.training.limits import check_layers, check_warmup, fit_length
from buleyean_rl.training.processes import join
from buleyean_rl.training.progress import ShowProgress
from buleyean_rl.training.reference_cache import open_reference_cache
from buleyean_rl.training.report import RunReport, make_report, result_lines, write_report
from buleyean_rl.training.run_state import RunState, open_run, run_settings
from buleyean_rl.training.trainer import BuleyeanTrainer

OWN_TEXT, ESTIMATE = "drawing the base model's own text", "estimating time and memory"  # as the phases are called
PUBLISHED_WARNING = (
    "[yellow]warning:[/] the published contrast is a cross-entropy towards the rejected tokens, and its target spreads "
    "over the whole vocabulary: expect damaged text. It is for reproducing the published numbers; leave out "
    "--objective to learn from rejections."
)


def train(
    records_path: Path | str,
    model_name: str | Source | Model,
    config: BuleyeanConfig,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> RunReport:
    """Train an adapter on a records file and write the run folder.

    Args:
        records_path: of the records file.
        model_name: the base model, see `models.source.resolve`; or in memory, whose weights are shared, not changed.
        config: the settings; `config.output_dir` is the run folder.
        resume: resume a run that was stopped.
        skip_bad: skip malformed records instead of raising at the first.
        callbacks: as for `Trainer`; of several processes in the first.
        console: for progress, of several processes of the first; None for no output.

    Returns:
        The report in `run.json`.

    Raises:
        RecordError: the records cannot be used.
        ModelError: the model cannot be used.
        TrainingError: training failed or changed nothing.
        ProcessError: another of several processes failed.
        UsageError: the run folder cannot be used.
    """
    with join() as processes:
        config = copy(config)  # the data decides some of it
        config.processes = processes
        use_current_gpu(config)  # which a launcher's process has since it joined
        console = Console(quiet=True) if console is None or not processes.is_first else console
        return _open_and_train(
            Path(records_path), model_name, config, resume, skip_bad, callbacks if processes.is_first else (), console
        )


def _open_and_train(
    records_path: Path,
    model_name: str | Source | Model,
    config: BuleyeanConfig,
    resume: bool,
    skip_bad: bool,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> RunReport:
    folder = Path(str(config.output_dir))
    records = RecordsFile(records_path, records_sha256(records_path), skip_bad)
    if isinstance(model_name, Model):
        if config.base_bits not in (None, model_name.base_bits):
            raise UsageError(
                f"base_bits is {config.base_bits}, and the model in memory has {model_name.base_bits or 'blocks'}"
            )
        model = model_name.with_source(model_name.source)
    else:
        model = open_model(resolve(model_name), config.device, base_bits=config.base_bits)
    settings = run_settings(model.source.absolute_name, records.sha256, config)
    with name_full_disk(folder), open_run(folder, settings, resume, console, config.processes) as state:
        config.output_dir, config.begun_processes = str(state.folder), state.begun_processes
        return _train(state, records, model, config, callbacks, console)


def _train(
    state: RunState,
    records: RecordsFile,
    model: Model,
    config: BuleyeanConfig,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> RunReport:
    """Train in a folder that is held."""
    processes = config.processes
    if config.objective == "published":
        console.print(PUBLISHED_WARNING)
    with processes.host_first():
        numerics = model.numerics
    state.record("compute", numerics)
    dataset = prepare_data(records, model, config, console)
    attach_run_adapter(model, config, console)
    settle_firmness(model, dataset, config, console)
    state.record("compute", model.training_numerics | processes.describe())
    _take_intervals(state.checkpoint, config)
    measurement = Measurement(model, dataset, config)
    guard = make_guard(model, measurement.texts, dataset, config) if config.guard else None
    with working(console, "measuring the base model"):
        before = measurement.before(guard)
    with working(console, OWN_TEXT):
        anchors = anchor_groups(model, dataset, config)
    references = open_reference_cache(model, dataset, config, anchors, console)
    progress, guards = ShowProgress(console), [] if guard is None else [guard]
    trainer = BuleyeanTrainer(model, config, dataset.training, [progress, *callbacks, *guards], references, anchors)
    if processes.is_first:
        read_tokens = tokens_to_read(measurement, guard)
        with working(console, ESTIMATE):
            need = estimate(trainer, dataset.training, read_tokens, is_cached=trainer.has_cache)
        console.print(str(need))

    with state.failing():
        _fit(trainer, state.checkpoint, progress, guard)
        if guard is not None and guard.stop_reason:
            console.print(
                f"[yellow]the guard ended the run at step {guard.checks[-1].step}:[/] {guard.stop_reason}; "
                f"the adapter of step {guard.restored_step} is restored"
            )
        with working(console, "measuring the trained model"):
            after = measurement.objective()
            scale = _apply_scale(trainer, guard, console)
            if scale != 1:
                after |= {name: value for name, value in measurement.objective().items() if name == "rejected_nll"}
            drift = measurement.drift()
        report = make_report(trainer, dataset, settings=state.settings, before=before, after=after, drift=drift)
    peak = int(processes.maximum(report.peak_rss_bytes))
    guarded = None if guard is None else guard.report()
    report = replace(report, guard=guarded, adapter_scale=scale, peak_rss_bytes=peak)
    if not processes.is_first:
        return report
    trainer.save_model(str(state.folder))
    trainer.state.save_to_json(str(state.folder / "trainer_state.json"))
    write_report(state.folder, report, trainer.state.log_history)
    state.finish()
    console.print(result_lines(report))
    console.print(f"written to {escape(str(config.output_dir))}")
    return report


def prepare_data(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> Dataset:
    """Read, tokenise and split a run's records, and check the settings against them.

    Args:
        records: the file.
        model: the base model.
        config: the settings; `max_length` is lowered to the model's context.
        console: for progress, and what was noticed.

    Raises:
        RecordError: the records cannot be used.
        UsageError: a setting makes no sense for them.
    """
    cut = fit_length(config, model)
    dataset = load_dataset(records, model, config, console)
    console.print(dataset.describe())
    if cut:
        console.print(cut)
    check_warmup(config, len(dataset.training))
    return dataset


def attach_run_adapter(model: Model, config: BuleyeanConfig, console: Console) -> None:
    """Load a base model and attach the run's adapter, initialised by the seed.

    Args:
        model: the base model.
        config: the settings.
        console: where the model is described.
    """
    adapter = lora_config(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    with working(console, f"loading {model.source.name}"):
        with config.processes.host_first():  # a GGUF file is converted once
            check_layers(model.plain, config)
        set_seed(config.seed)
        model.attach_adapter(adapter)
    console.print(escape(model.describe()))


def settle_firmness(model: Model, dataset: Dataset, config: BuleyeanConfig, console: Console) -> None:
    """Decide how firm a rejection is, and say it; see `decide_firmness`."""
    with working(console, "looking at the rejected answers"):
        decided = decide_firmness(model, dataset, config)
    if decided:
        console.print(decided)


def make_guard(
    model: Model, texts: Mapping[str, Sequence[Boundary]], dataset: Dataset, config: BuleyeanConfig
) -> Guard:
    """The guard of a run, which uses texts and the bundled prompts.

    Args:
        model: with its adapter.
        texts: that drift is measured on, by kind.
        dataset: what is trained on.
        config: the settings.
    """
    return Guard(
        model,
        texts,
        demo_data.held_out_prompts(),
        float(dataset.training.sizes.mean()) * config.step_records,
        Path(str(config.output_dir)),
        Limits(config.guard_kl, config.guard_entropy),
        config.processes,
    )


def _take_intervals(checkpoint: Checkpoint | None, config: BuleyeanConfig) -> None:
    """Take the intervals of a checkpoint: shares became numbers of steps, and transformers warns of differences."""
    if checkpoint is not None:
        earlier = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        config.save_steps, config.logging_steps = earlier.save_steps, earlier.logging_steps


def tokens_to_read(measurement: Measurement, guard: Guard | None) -> Callable[[int], int]:
    """Steps -> tokens that are read besides training, by the guard and to measure the trained model."""
    return lambda steps: measurement.tokens + (0 if guard is None else guard.tokens(steps))


def _fit(trainer: BuleyeanTrainer, checkpoint: Checkpoint | None, progress: ShowProgress, guard: Guard | None) -> None:
    """Train, and check that the adapter has changed."""
    checksum_before = _adapter_checksum(trainer.language_model)
    path = None if checkpoint is None else checkpoint.path
    try:
        if path is not None and _is_trained(path, guard):
            trainer.restore(path)
        else:
            trainer.train(resume_from_checkpoint=None if path is None else str(path))
    finally:
        progress.stop()
    if guard is not None and guard.restored_step == 0:
        raise TrainingError(
            f"the guard ended the run at its first check, step {guard.checks[-1].step}: {guard.stop_reason}; lower the "
            "learning rate, or train without it: --no-guard"
        )
    if _adapter_checksum(trainer.language_model) == checksum_before:
        raise TrainingError("training left the adapter exactly as it was: raise the learning rate or the steps")


def _is_trained(checkpoint: Path, guard: Guard | None) -> bool:
    """Whether nothing is left to train after a checkpoint; what it holds of the guard is restored."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if guard is not None:
        guard.resume(state.stateful_callbacks[type(guard).__name__])
    return state.global_step >= state.max_steps or (guard is not None and guard.stop_reason is not None)


def _apply_scale(trainer: BuleyeanTrainer, guard: Guard | None, console: Console) -> float:
    """Scale the trained adapter by `adapter_scale`, unless that violates a limit of the guard; returns the scale."""
    scale = trainer.args.adapter_scale
    if scale == 1 or (guard is not None and guard.stop_reason):
        return 1.0
    scale_adapter(trainer.language_model.module, scale)
    if guard is None or not (violation := guard.find_violation(trainer.state.global_step)):
        return scale
    guard.restore()
    console.print(f"[yellow]the adapter is left at scale 1:[/] at scale {scale:g} {violation}")
    return 1.0


def _adapter_checksum(model: Model) -> int:
    """A checksum of the trained weights."""
    return hash(tuple(p.detach().double().sum().item() for p in model.module.parameters() if p.requires_grad))
