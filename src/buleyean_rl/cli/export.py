"""`buleyean export` and `buleyean push`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, EngineName, Overwrite, announced, print_json, print_next, stderr_console
from buleyean_rl.system.wording import counted


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a base model as for `train`.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .gguf file to write.")],
    quant: Annotated[
        str | None,
        typer.Option(help="q8_0 (default), q6_k, q5_k_m, q4_k_m, q2_k ..., f16, bf16, f32; comma-separated."),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, for llama.cpp's --lora.")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile for Ollama, too.")] = False,
    name: Annotated[str | None, typer.Option(help="The model's name in the file (its own).")] = None,
    author: Annotated[str | None, typer.Option(help="The author in the file.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence, such as apache-2.0.")] = None,
    url: Annotated[str | None, typer.Option(help="URL of the model's card.")] = None,
    engine: EngineName = "xllamacpp",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge a run into its base model and write a GGUF file, checked in llama.cpp before it is renamed."""
    with announced(f"exporting {run} to {output}"):
        from buleyean_rl.api import calls
        from buleyean_rl.errors import UsageError
        from buleyean_rl.gguf import About
        from buleyean_rl.models.run_folder import find_model

    if adapter and ollama:
        raise UsageError("--ollama describes the merged model: leave out --adapter")
    with _sigterm_as_interrupt():
        exported = calls.export(
            run,
            output,
            quant.split(",") if quant else None,
            adapter=adapter,
            ollama=ollama,
            about=About(name=name, author=author, license=license, url=url),
            engine=engine,
            overwrite=overwrite,
            console=stderr_console(),
        )
    print_json(exported.report, as_json)
    first = exported.path
    if not adapter:
        print_next("chat", first)
    elif (base := find_model(run).base) is not None and base.gguf_path is not None:
        print_next("chat", base.name, "--lora", first)


def push(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="A run folder, GGUF files, or a records file.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the Hub.")],
    run: Annotated[str | None, typer.Option(metavar="RUN", help="The run that GGUF files were exported from.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence on the card, such as apache-2.0.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit message.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the repository's README.md.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without confirmation.")] = False,
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
            raise UsageError("stdin is not a terminal to confirm on: add --yes to upload")
        typer.confirm("upload?", abort=True, err=True)
    address = upload(plan, to, private=not public, overwrite_card=overwrite, message=message)
    print(f"uploaded: {counted(len(plan.files), 'file')} to {address}", file=sys.stderr)
    print_json({"url": address, "files": list(plan.files)}, as_json)
    if plan.kind == "dataset":
        print_next("data", "import", to, "-o", "records.jsonl")
    elif Path(paths[0]).is_dir():
        print_next("export", paths[0], "-o", f"{to.rpartition('/')[2]}.gguf")
    else:
        print_next("chat", paths[0])


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM is Ctrl-C within the context, so that unfinished files are removed."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
