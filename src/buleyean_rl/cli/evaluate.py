"""`buleyean evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from buleyean_rl.cli.options import (
    BUNDLED_DATA,
    Context,
    Overwrite,
    print_json,
    print_report,
    read_prompts_or_bundled,
    stderr_console,
)
from buleyean_rl.errors import UsageError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A base model as for `train`, a run, or a GGUF file.")],
    pairs: Annotated[
        str | None, typer.Option(metavar="FILE", help="Preferences in any format that `data import` reads.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out rejections with counts, in the same formats.")
    ] = None,
    neutral: Annotated[
        str | None, typer.Option(metavar="FILE", help="Neutral texts, one a line or `text` in JSON Lines; or: bundled.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts to answer, as for `mine`; or: bundled.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Reference of a model that is not a run, for log pi/pi_ref.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model, on the same items; repeatable.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as one JSON object; - for stdout.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Plot the figures with their intervals.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of preferences, of records, of texts and of prompts.")
    ] = None,
    max_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1_000_000, help="Maximum tokens of an answer (128); repeatable."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, max=100, help="Of the answers (0, greedy); repeatable.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, max=1_000_000, help="Maximum tokens of a prompt and one answer.")
    ] = 1024,
    context: Context = None,
    engine: Annotated[str, typer.Option(help="auto, transformers or llama.cpp.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled answers and of the bootstrap intervals.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count bad rows.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model without a judge: rankings, drift, answers, loops; by default on bundled data."""
    from pathlib import Path

    from buleyean_rl import demo_data
    from buleyean_rl.data.importers import read_preferences
    from buleyean_rl.evaluation.drift import PASSAGES
    from buleyean_rl.evaluation.measure import Material, plain_texts
    from buleyean_rl.evaluation.measure import evaluate as run
    from buleyean_rl.evaluation.measured_model import Bases, Settings, make_samplings
    from buleyean_rl.evaluation.show import PICTURES, as_json, is_evaluation, is_our_plot, lines, table
    from buleyean_rl.evaluation.show import plot as draw
    from buleyean_rl.evaluation.texts import read_texts
    from buleyean_rl.system.files import encode_json
    from buleyean_rl.system.outputs import check_output_file, open_output

    if plot is not None and Path(plot).suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: end it in {', '.join(PICTURES)}")
    for target, is_ours in ((json_file, is_evaluation), (plot, is_our_plot)):
        if target is not None and target != "-":
            check_output_file(Path(target), overwrite=overwrite, is_ours=is_ours)
    if not any((pairs, records, neutral, prompts)):
        neutral = prompts = BUNDLED_DATA
    texts: Sequence[str] = ()
    if neutral is not None:
        texts = demo_data.neutral_texts() if neutral == BUNDLED_DATA else read_texts(Path(neutral))
    passages = min(PASSAGES, limit or PASSAGES) if texts else 0
    prompt_list = (
        [] if prompts is None else read_prompts_or_bundled(None if prompts == BUNDLED_DATA else prompts, "held_out")
    )
    preferences, rejections = (
        None if source is None else read_preferences(source, limit=limit, skip_bad=skip_bad)
        for source in (pairs, records)
    )
    material = Material(preferences, rejections, plain_texts(texts, limit), passages, tuple(prompt_list[:limit]))
    samplings = make_samplings(temperature or [0.0], max_tokens or [128], seed)
    settings, console = Settings(max_length, samplings, engine, context, model), stderr_console()
    bases = Bases(1 if reference is None else 2)
    evaluations = [
        run(name, material, settings, reference=paired, console=console, bases=bases)
        for name, paired in [
            (model, reference),
            *((name, _reference_for(name, reference)) for name in compare or []),
        ]
    ]
    console.print(table(evaluations, seed))
    print_report([line for evaluation in evaluations for line in lines(evaluation)], None)
    result = as_json(evaluations, seed)
    if json_file == "-":
        print_json(result, True)
    elif json_file is not None:
        with open_output(Path(json_file)) as file:
            file.write(encode_json(result, allow_nan=False))
    if plot is not None:
        draw(Path(plot), evaluations, seed)


def _reference_for(name: str, reference: str | None) -> str | None:
    """The reference of a compared model; None for a run, which has its base, and for the reference itself."""
    from buleyean_rl.models.run_files import is_run

    return None if is_run(name) or name == reference else reference
