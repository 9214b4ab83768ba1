"""`buleyean demo`, `buleyean chat` and `buleyean void`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, Context, EngineName, print_json, stderr_console
from buleyean_rl.errors import UsageError


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")] = "buleyean-demo",
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer steps: a minute or two.")] = False,
    engine: EngineName = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """Run the main job on the bundled model and data: mine loops, train, export, measure, compare."""
    from pathlib import Path

    from buleyean_rl.demo import run_demo

    print_json(run_demo(Path(output), quick=quick, engine=engine, console=stderr_console()), as_json)


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL.GGUF", help="The model to talk to.")],
    compare: Annotated[str | None, typer.Option(metavar="BASE.GGUF", help="Another model, side by side.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling; unused at temperature 0.")] = 0,
    context: Context = None,
    engine: EngineName = "xllamacpp",
) -> None:
    """Talk to a GGUF model in llama.cpp."""
    from rich.console import Console

    from buleyean_rl.inference import chat as terminal
    from buleyean_rl.inference.protocol import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with terminal.open_models([model] if compare is None else [compare, model], context, engine) as models:
        if prompt is None:
            terminal.talk(models, Console(), system=system, sampling=sampling)
        elif compare is None:
            terminal.ask(models[0].engine, prompt, sys.stdout, system=system, sampling=sampling)
        else:
            terminal.compare(models, prompt, Console(), system=system, sampling=sampling)


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
        from buleyean_rl.void.serve import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing: pip install 'buleyean-rl[void]'") from error

    serve(model, Path(output), host, port, console=stderr_console())
