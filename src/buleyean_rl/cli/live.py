"""`buleyean serve`, `buleyean swap` and `buleyean connect`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from buleyean_rl.cli.options import (
    BUNDLED_MODEL,
    AsJson,
    Context,
    announced,
    print_json,
    print_next,
    print_report,
    stderr_console,
)
from buleyean_rl.errors import UsageError

KeyFile = Annotated[
    str | None,
    typer.Option("--api-key", metavar="FILE", help="A file with the key, mode 600; else BULEYEAN_SERVE_KEY."),
]


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a GGUF file, or a base model as for `train`.")],
    lora: Annotated[
        str | None, typer.Option(metavar="FILE", help="An adapter GGUF for MODEL, as `export --adapter` writes it.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any but a loopback address requires a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 8080,
    key_file: KeyFile = None,
    name: Annotated[str, typer.Option(help="The model's name in the list of models; default: its base's.")] = "",
    context: Context = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=256, help="Conversations at once; default: as memory allows, at most 8.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: the available cores.")] = None,
    remember: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Keep completions there for a week, so that they can be rejected."),
    ] = None,
) -> None:
    """Serve a model by the OpenAI API, and let other runs take its place while it answers.

    The key is in BULEYEAN_SERVE_KEY or the file of --api-key; other addresses than loopback get a random one else.
    """
    from pathlib import Path

    try:
        with announced(f"loading {model}"):
            from buleyean_rl.live.serve import Settings
            from buleyean_rl.live.serve import serve as run_server
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing: pip install '.[void]' in the clone") from error
    paths = [None if path is None else Path(path) for path in (key_file, remember)]
    settings = Settings(host, port, paths[0], context, slots, threads, name, paths[1])
    run_server(model, lora, settings, stderr_console())


def swap(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run, a GGUF file, whole or an adapter, or a base model.")
    ] = None,
    url: Annotated[str, typer.Option(help="Where `buleyean serve` answers.")] = "http://127.0.0.1:8080",
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to what answered before the last swap.")
    ] = False,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a run answer at a running server, once it has passed the gate; no request is dropped."""
    if (run is None) is not rollback:
        raise UsageError("name the run to swap in, or give --rollback")
    with announced("going back" if run is None else f"swapping {run} in"):
        from pathlib import Path

        from buleyean_rl.live.client import swap as ask_server
        from buleyean_rl.live.keys import SERVE_VARIABLE, find_key

    reply = ask_server(url, find_key(SERVE_VARIABLE, Path(key_file) if key_file else None), run)
    print(f"{reply['run']} answers as {reply['models'][0]}", file=sys.stderr)
    if (gate := reply["gate"]) is not None:
        failed = f"{gate['failed']:.0%} of its answers loop or are empty, {gate['base_failed']:.0%} of its base's"
        print(f"{gate['drift']:.3f} nats a token from its base; {failed}", file=sys.stderr)
    print_json(reply, as_json)


def connect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="openwebui:URL, langfuse:URL, langsmith:URL[#PROJECT], or a log that grows."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for what is fetched, one a source.")],
    key_file: Annotated[
        str | None,
        typer.Option("--api-key", metavar="FILE", help="A file with the key, mode 600; else from the environment."),
    ] = None,
    score: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the score to use in a trace.")] = None,
    below: Annotated[float | None, typer.Option(metavar="X", help="A score below this is a rejection.")] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Remove e-mail addresses, phone numbers and keys.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch rated answers that are new since the last time, as records.

    Keys are read from OPENWEBUI_API_KEY, LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY, LANGSMITH_API_KEY.
    """
    with announced(f"fetching from {source}"):
        from pathlib import Path

        from buleyean_rl.data.importers import Choices
        from buleyean_rl.live.connect.sync import ImportSettings, sync

    settings = ImportSettings(Choices(score=score, below=below), redact)
    visit = sync(source, Path(output), settings, Path(key_file) if key_file else None)
    lines = visit.report.lines() if visit.report else [visit.remark or f"nothing is new at {source}"]
    records = None if visit.records is None else str(visit.records)
    print_report(lines, {"is_new": visit.is_new, "records": records} if as_json else None)
    if visit.records is not None:
        print_next("train", visit.records, "--model", BUNDLED_MODEL, "-o", "my-run")
