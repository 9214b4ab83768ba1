"""`buleyean evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from buleyean_rl.cli.options import Context, Overwrite, announced, print_json, print_next, print_report, stderr_console
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
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="Draw a forest plot of the differences, with intervals."),
    ] = None,
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
    with announced(f"measuring {', '.join([model, *(compare or [])])}"):
        from pathlib import Path

        from buleyean_rl.api import calls
        from buleyean_rl.evaluation.forest_plot import PICTURES, is_our_plot
        from buleyean_rl.evaluation.show import is_evaluation
        from buleyean_rl.system.files import encode_json
        from buleyean_rl.system.outputs import check_output_file, open_output

    if plot is not None and Path(plot).suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: end it in {', '.join(PICTURES)}")
    for target, is_ours in ((json_file, is_evaluation), (plot, is_our_plot)):
        if target is not None and target != "-":
            check_output_file(Path(target), overwrite=overwrite, is_ours=is_ours)
    comparison = calls.evaluate(
        model,
        compare=compare or (),
        pairs=pairs,
        records=records,
        neutral=neutral,
        prompts=prompts,
        reference=reference,
        limit=limit,
        max_length=max_length,
        max_tokens=max_tokens or 128,
        temperature=temperature or 0.0,
        context=context,
        engine=engine,
        seed=seed,
        skip_bad=skip_bad,
        console=stderr_console(),
    )
    print_report(comparison.lines(), None)
    result = comparison.as_json()
    if json_file == "-":
        print_json(result, True)
    elif json_file is not None:
        with open_output(Path(json_file)) as file:
            file.write(encode_json(result, allow_nan=False))
    if plot is not None:
        comparison.plot(plot, overwrite=True)
    _print_next(model, comparison.evaluations[0].reference, bool(compare))


def _print_next(model: str, base: str | None, is_compared: bool) -> None:
    """What people do with a measured run: see whether it is better, then take it."""
    from buleyean_rl.models.run_files import is_run

    if is_run(model) and base is not None:
        if is_compared:
            print_next("export", model, "-o", "my-model.gguf")
        else:
            print_next("evaluate", model, "--compare", base)
