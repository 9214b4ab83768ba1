"""`buleyean evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from buleyean_rl.cli.options import BUNDLED_DATA, print_json, print_report, read_prompts_or_bundled, stderr_console
from buleyean_rl.errors import UsageError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `train` takes, a run folder, or a GGUF file.")],
    pairs: Annotated[
        str | None, typer.Option(metavar="FILE", help="Preferences in any format that `data import` reads.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out rejections: the same formats, with counts.")
    ] = None,
    neutral: Annotated[
        str | None, typer.Option(metavar="FILE", help="Plain texts, a line each or `text` in JSON Lines; or: bundled.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts to answer, as for `mine`; or: bundled.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base of a model that is no run: log pi/pi_ref needs one.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model, on the same items; repeat it.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as one JSON object; - for stdout.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the figures with their intervals.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many of each: preferences, records, texts, prompts.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer given.")] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="The most tokens of a prompt and one answer.")] = 1024,
    engine: Annotated[str, typer.Option(help="auto, transformers or llama.cpp.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of stopping.")] = False,
) -> None:
    """Measure a model without a judge: rankings, likelihoods, drift, loops; asked for nothing, on bundled data."""
    from pathlib import Path

    from buleyean_rl import demo_data
    from buleyean_rl.data.importers import read_preferences
    from buleyean_rl.evaluation.measure import Material, Settings, read_texts
    from buleyean_rl.evaluation.measure import evaluate as run
    from buleyean_rl.evaluation.show import PICTURES, as_json, lines, table
    from buleyean_rl.evaluation.show import plot as draw
    from buleyean_rl.system.files import write_json

    for target in (json_file, plot):
        if target is not None and target != "-" and not Path(target).parent.is_dir():
            raise UsageError(f"{target}: there is no folder {Path(target).parent}: make it first")
    if plot is not None and Path(plot).suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: end it in {', '.join(PICTURES)}")
    if not any((pairs, records, neutral, prompts)):
        neutral = prompts = BUNDLED_DATA
    texts: tuple[str, ...] = ()
    if neutral == BUNDLED_DATA:
        texts = tuple(demo_data.neutral_texts()[:limit])
    elif neutral is not None:
        texts = read_texts(Path(neutral), limit)
    asked = [] if prompts is None else read_prompts_or_bundled(None if prompts == BUNDLED_DATA else prompts, "held_out")
    preferences, rejections = (
        None if source is None else read_preferences(source, limit=limit, skip_bad=skip_bad)
        for source in (pairs, records)
    )
    material = Material(preferences, rejections, texts, tuple(asked[:limit]))
    settings, console = Settings(max_length, max_tokens, engine), stderr_console()
    evaluations = [run(model, material, settings, reference=reference, console=console)]
    for other in compare or []:
        evaluations.append(run(other, material, settings, reference=_unless_run(other, reference), console=console))
    console.print(table(evaluations, seed))
    print_report([line for evaluation in evaluations for line in lines(evaluation)], None)
    result = as_json(evaluations, seed)
    if json_file == "-":
        print_json(result, True)
    elif json_file is not None:
        write_json(Path(json_file), result)
    if plot is not None:
        draw(Path(plot), evaluations, seed)


def _unless_run(name: str, reference: str | None) -> str | None:
    """The reference of a model beside others: a run has its own, and a reference needs none."""
    from buleyean_rl.models.run_folder import is_run

    return None if is_run(name) or name == reference else reference
