"""`buleyean demo`, `buleyean chat` and `buleyean void`."""

from __future__ import annotations

from typing import Annotated

import typer

from buleyean_rl.cli.options import (
    AsJson,
    Context,
    EngineName,
    announced,
    print_json,
    print_next,
    print_report,
    stderr_console,
)
from buleyean_rl.errors import UsageError
from buleyean_rl.system.wording import counted


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")] = "buleyean-demo",
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer steps: a minute or two.")] = False,
    engine: EngineName = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """Run the main job on the bundled model and data: mine loops, train, export, measure, compare."""
    with announced("the main job on the bundled model: mine, train, export, compare; some minutes"):
        from pathlib import Path

        from buleyean_rl.demo import run_demo

    print_json(run_demo(Path(output), quick=quick, engine=engine, console=stderr_console()), as_json)


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a GGUF file, or a base model as for `train`.")],
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Another model, which answers first, side by side.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="FILE", help="An adapter GGUF for MODEL, as `export --adapter` writes it.")
    ] = None,
    rejections: Annotated[
        str, typer.Option(metavar="FILE", help="The records file that /no adds rejected answers to.")
    ] = "rejections.jsonl",
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling; unused at temperature 0.")] = 0,
    context: Context = None,
    engine: EngineName = "xllamacpp",
) -> None:
    """Talk to a model, and reject its answers with /no.

    A GGUF file answers in llama.cpp, other models as they were trained.
    """
    with announced(f"opening {model if compare is None else f'{compare} and {model}'}"):
        from pathlib import Path

        from rich.console import Console

        from buleyean_rl.inference import chat as terminal
        from buleyean_rl.inference.protocol import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    opened = terminal.open_models(
        [model] if compare is None else [compare, model], context, engine, lora=lora, console=stderr_console()
    )
    with opened as models:
        if prompt is not None:
            terminal.ask(models, prompt, Console(), system=system, sampling=sampling)
            return
        rejected = terminal.talk(models, Console(), rejections=Path(rejections), system=system, sampling=sampling)
    if rejected:
        print_report([f"{counted(rejected, 'rejection')} added to {rejections}"], None)
        print_next("train", rejections, "--model", terminal.base_name(model), "--preset", "few", "-o", "my-run")


def void(
    model: Annotated[str, typer.Option(help="The base model, as for `train`.")] = "smollm2-135m",
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for rejections and runs.")] = "void",
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any but a loopback address requires a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 7860,
) -> None:
    """Serve a page to chat with base and trained model, reject answers, and train.

    The token is BULEYEAN_VOID_TOKEN, or a random one, which is printed.
    """
    from pathlib import Path

    try:
        with announced(f"starting the page for {model}"):
            from buleyean_rl.void.serve import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing: pip install '.[void]' in the clone") from error

    serve(model, Path(output), host, port, console=stderr_console())
