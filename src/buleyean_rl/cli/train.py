"""`buleyean train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, Interrupted, announced, print_json, print_next, stderr_console
from buleyean_rl.errors import UsageError


def train(
    records: Annotated[str | None, typer.Argument(metavar="RECORDS", help="A records file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="smollm2-135m (bundled), smollm2-360m, a Hub id, a folder or a GGUF.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="RUN", help="The run folder to write.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file of settings; options override it.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings by purpose: log (default), loops (mined answers that loop) or few.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="complement (default), listwise or published.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the KL (complement 0.9, the others 0.7).")] = None,
    tau: Annotated[float | None, typer.Option(help="How firm a rejection is; 1: published (from the data).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate (from the data).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the records (from the data).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Maximum number of steps; overrides the epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per step and process (from the data).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a prompt and one answer (1024).")] = None,
    micro_batch_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of a forward pass (1,280; fp32 640; GPU 32,000): fewer take less memory."),
    ] = None,
    guard: Annotated[
        bool | None, typer.Option("--guard/--no-guard", help="End the run before it ruins the model (on).")
    ] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the records held out to measure on (0.1).")] = None,
    base_bits: Annotated[
        int | None, typer.Option(help="Bits of a number of the frozen base: 16, or 8 or 4, which take less memory.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapter (16).")] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="Factor of the trained adapter (1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bytes (42).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a run that was stopped.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count bad records.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would take, and write nothing.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as YAML for --config, and exit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on rejections; writes an adapter, run.json, loss.png and a model card.

    RECORDS, --model and --output are required, but for --print-config.
    """
    settings = {
        "preset": preset,
        "objective": objective,
        "alpha": alpha,
        "tau": tau,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "micro_batch_tokens": micro_batch_tokens,
        "guard": guard,
        "held_out": held_out,
        "base_bits": base_bits,
        "lora_rank": lora_rank,
        "adapter_scale": adapter_scale,
        "seed": seed,
    }
    options = {name: value for name, value in settings.items() if value is not None}
    file = Path(config) if config else None
    if print_config:
        from buleyean_rl.training.config import config_yaml

        print(config_yaml(file, options), end="")
        return
    if records is None or model is None or output is None:
        missing = "RECORDS" if records is None else "--model" if model is None else "--output"
        raise UsageError(f"{missing} is missing: buleyean train RECORDS --model MODEL --output RUN")
    with announced(f"{'planning a run of' if dry_run else 'training'} {model} on {records}"):
        from dataclasses import asdict

        from buleyean_rl.training.config import load_config
        from buleyean_rl.training.dry_run import dry_run as plan_run
        from buleyean_rl.training.processes import join
        from buleyean_rl.training.run import train as run

    # joined before all else: an error of any process is then told once
    telling = nullcontext() if dry_run else _telling_where_it_stands(Path(output))
    with telling, join() as processes:
        run_config, console = load_config(file, Path(output), options), stderr_console()
        if dry_run:
            if processes.size > 1:
                raise UsageError(f"--dry-run is one process, and {processes.size} were started")
            plan = plan_run(Path(records), model, run_config, skip_bad=skip_bad, console=console)
            console.print("\n".join(plan.lines()))
            print_json(plan.as_dict(), as_json)
            return
        report = run(Path(records), model, run_config, resume=resume, skip_bad=skip_bad, console=console)
    if processes.is_first:
        print_json(asdict(report), as_json)
        print_next("chat", output)


@contextmanager
def _telling_where_it_stands(run: Path) -> Iterator[None]:
    """Ctrl-C says how far the run is, and whether it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        from buleyean_rl.training.run_state import can_resume
        from buleyean_rl.training.runs import summarise

        if not can_resume(run):
            raise Interrupted("nothing was trained yet; the same command begins anew") from None
        summary = summarise(run)
        if summary.steps is None:
            raise Interrupted("before its first checkpoint; the same command begins anew") from None
        message = f"step {summary.steps:,} of {summary.total_steps:,} is kept in {run}"
        raise Interrupted(message, "--resume") from None
