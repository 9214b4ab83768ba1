"""`buleyean mine` and `buleyean walk`."""

from __future__ import annotations

from typing import Annotated

import typer

from buleyean_rl.cli.options import (
    BUNDLED_DATA,
    BUNDLED_MODEL,
    DEFAULT_JUDGE,
    AsJson,
    Context,
    Judges,
    Overwrite,
    Prompts,
    announced,
    print_json,
    print_next,
    print_report,
    stderr_console,
)
from buleyean_rl.system.launcher import is_first
from buleyean_rl.system.wording import counted


def mine(
    prompts: Prompts = BUNDLED_DATA,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A base model as for `train`, a run folder, or an endpoint (URL#MODEL). Several endpoints share the "
            "work: repeat it, or name a file of them.",
            show_default=BUNDLED_MODEL,
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The records file to write.")] = "records.jsonl",
    judge: Judges = None,
    rubric: Annotated[str | None, typer.Option(metavar="FILE", help="The rubric of an LLM judge.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: 0 for one sample, 0.8 for more.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same records.")] = 0,
    context: Context = None,
    engine: Annotated[str, typer.Option(help="auto, transformers or llama.cpp.")] = "auto",
    keep_accepted: Annotated[
        bool, typer.Option("--keep-accepted/--no-keep-accepted", help="Keep what no judge rejected, as anchors.")
    ] = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Let a model answer prompts, judge the answers, and write them as records.

    Stopped or killed, the same command resumes; with other judges it judges the same answers. An endpoint's key is
    read from BULEYEAN_API_KEY, that of the first judge's endpoint from BULEYEAN_JUDGE_API_KEY.
    """
    names = model or [BUNDLED_MODEL]
    answering = f"{', '.join(names)} {'answer' if len(names) > 1 else 'answers'}"
    with announced(f"mining {output}: {answering}, {', '.join(judge or [DEFAULT_JUDGE])} judges"):
        from dataclasses import asdict

        from buleyean_rl.api import calls
        from buleyean_rl.errors import RecordError
        from buleyean_rl.inference.open import locate
        from buleyean_rl.models.source import Source

    location = locate(names)
    mined = calls.mine(
        prompts,
        location,
        output,
        judges=judge or DEFAULT_JUDGE,
        rubric=rubric,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        context=context,
        engine=engine,
        keep_accepted=keep_accepted,
        overwrite=overwrite,
        console=stderr_console() if is_first() else None,
    )
    if not is_first():
        return
    print_report(mined.report.lines(), asdict(mined.report) if as_json else None)
    if not mined.report.rejected:
        raise RecordError("nothing was rejected: there is nothing to learn from", path=output)
    base = (location.base or location).name if isinstance(location, Source) else "MODEL"
    print_next("train", output, "--model", base, "-o", "my-run")


def walk(
    prompts: Prompts = BUNDLED_DATA,
    model: Annotated[str, typer.Option(help="The base model, as for `train`.")] = "smollm2-135m",
    output: Annotated[str, typer.Option("--output", "-o", help="The folder of the walk.")] = "walk",
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="Rounds in total; a higher number continues a walk.")
    ] = 3,
    held_out: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts to measure on, never mined; default: bundled.")
    ] = BUNDLED_DATA,
    judge: Judges = None,
    rubric: Annotated[str | None, typer.Option(metavar="FILE", help="The rubric of an LLM judge.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Answers to each prompt and round.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: 0 for one sample, 0.8 for more.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same walk.")] = 0,
    epochs: Annotated[float | None, typer.Option(help="Passes over the records in each round (1.5).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate (7e-4).")] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="Factor of each round's adapter (1).")] = None,
    config: Annotated[str | None, typer.Option(metavar="RUN.YAML", help="Training settings, as for `train`.")] = None,
    engine: Annotated[
        str, typer.Option(help="Who answers: transformers, or llama.cpp for a GGUF file.")
    ] = "transformers",
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="vLLM that serves the base and answers instead, given each round's adapter; repeatable."
        ),
    ] = None,
    context: Context = None,
    max_drift: Annotated[
        float, typer.Option(help="Largest KL from the base on plain text, nats per token; a round beyond is the last.")
    ] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Mine, train on all rejections so far, measure; repeat with the trained model.

    Stopped or killed, the same command resumes.
    """
    most = f"{counted(rounds, 'round')} at most"
    with announced(f"walking in {output}: {most} of mining, training and measuring {model}"):
        from pathlib import Path

        from buleyean_rl.api import calls
        from buleyean_rl.api.inputs import default_temperature, find_judges, find_prompts
        from buleyean_rl.mining.draws import MineSettings
        from buleyean_rl.mining.walk import walk as run
        from buleyean_rl.mining.walk import walk_config

    engines = calls.find_round_engines(model, engine, server or [], context, stderr_console())
    overrides = {"learning_rate": learning_rate, "num_train_epochs": epochs, "adapter_scale": adapter_scale}
    result = run(
        find_prompts(prompts, "mine"),
        find_prompts(held_out, "held out"),
        model,
        Path(output),
        find_judges(judge or DEFAULT_JUDGE, rubric),
        walk_config(
            Path(config) if config else None, {name: value for name, value in overrides.items() if value is not None}
        ),
        rounds=rounds,
        settings=MineSettings(
            samples, max_tokens, default_temperature(samples, temperature), seed=seed, context=context
        ),
        max_drift=max_drift,
        engines=engines,
        console=stderr_console(),
    )
    print_json(result, as_json)
    if best := result.get("best"):
        print_next("chat", Path(output) / result["rounds"][best]["run"])
