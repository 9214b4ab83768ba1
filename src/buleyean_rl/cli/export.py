"""`buleyean export` and `buleyean push`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, EngineName, print_json, stderr_console


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or any model that `train` takes.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .gguf file to write.")],
    quant: Annotated[
        str | None,
        typer.Option(help="q8_0 (default), q6_k, q5_k_m, q4_k_m, q2_k ..., f16, bf16, f32; several with commas."),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, for llama.cpp's --lora.")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile for Ollama beside it.")] = False,
    name: Annotated[str | None, typer.Option(help="What the file calls the model; its own name if not given.")] = None,
    author: Annotated[str | None, typer.Option(help="Who trained it.")] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the model's card is.")] = None,
    engine: EngineName = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """Merge a run into its base model and write it as GGUF, checked in llama.cpp before it gets its name."""
    from pathlib import Path

    from buleyean_rl.errors import UsageError
    from buleyean_rl.gguf import About
    from buleyean_rl.gguf import export as exporting

    about = About(name=name, author=author, license=license, url=url)
    if adapter and ollama:
        raise UsageError("--ollama describes the merged model: leave out --adapter")
    path, console = Path(output), stderr_console()
    with _ended_like_interrupted():
        if adapter:
            written = exporting.export_adapter(run, path, quant or "f16", engine=engine, about=about, console=console)
        else:
            quants = (quant or "q8_0").split(",")
            written = exporting.export(run, path, quants, ollama=ollama, engine=engine, about=about, console=console)
    print_json(written, as_json)


def push(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="A run folder, GGUF files, or a records file.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the Hub.")],
    run: Annotated[str | None, typer.Option(metavar="RUN", help="The run that GGUF files were made from.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is for everyone to see.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a run, GGUF files or records to the Hugging Face Hub, with a card; a new repository is private."""
    from pathlib import Path

    from buleyean_rl.errors import UsageError
    from buleyean_rl.hub.push import plan_upload, upload

    plan = plan_upload([Path(p) for p in paths], to, run=Path(run) if run else None, license=license)
    for line in (f"to {plan.kind} {to}, {'public' if public else 'private'} if it is new:", *plan.lines()):
        print(line, file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to be asked: add --yes to upload")
        typer.confirm("upload?", abort=True, err=True)
    address = upload(plan, to, private=not public, message=message)
    print(address, file=sys.stderr)
    print_json({"url": address, "files": list(plan.files)}, as_json)


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Being told to end (SIGTERM) is Ctrl-C within: what was begun is cleaned up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
