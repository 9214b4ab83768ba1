"""`buleyean data import` and `buleyean data validate`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from buleyean_rl.cli.options import BUNDLED_MODEL, AsJson, Overwrite, print_next, print_report, stderr_console
from buleyean_rl.errors import UsageError

app = typer.Typer(help="Import data as rejection records, and validate them.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("import", short_help="Import pairs, labels, scores, a table or a log as records.")
def data_import(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="A file (.jsonl, .json, .csv, .parquet, ..., also .gz and .zst), a folder, a pattern, or a Hub data "
            "set id; or several. Or a service, as for `connect`.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The records file to write.")],
    format: Annotated[
        str,
        typer.Option(help="auto, records, pairs, kto, scored, candidates, openwebui, librechat, traces or columns."),
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="The split of a Hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of records.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="Column for the role prompt, answer, score or system; repeatable."),
    ] = None,
    score: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the score to use in a trace.")] = None,
    below: Annotated[
        float | None,
        typer.Option(metavar="X", help="A score below this is a rejection; without it 0.5, of scores from -1 to 1."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encoding of a text file that is not UTF-8.")
    ] = None,
    keep_accepted: Annotated[
        bool | None,
        typer.Option(
            "--keep-accepted/--no-keep-accepted",
            help="Keep accepted answers, as anchors; default: those of a log of the model's own answers.",
        ),
    ] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Remove e-mail addresses, phone numbers and keys.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip and count bad rows, and bad files of several.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Import pairs, labels, scores, a table or an export as a records file. Chosen answers are discarded.

    Accepted answers of a log (openwebui, librechat, traces) anchor the model.
    """
    from buleyean_rl.system.progress import working

    roles = {}
    for assignment in column or []:
        role, separator, name = assignment.partition("=")
        if not (role and separator and name):
            raise UsageError(f"--column {assignment}: give a role and a column, such as prompt=question")
        roles[role] = name
    with working(stderr_console(), f"reading {', '.join(source)}") as show, ExitStack() as opened:
        from buleyean_rl.data.importers import Choices, import_records

        taken, format = _fetch(source, format, opened) if any("://" in each for each in source) else (source, format)
        report = import_records(
            taken,
            output,
            format=format,
            split=split,
            limit=limit,
            skip_bad=skip_bad,
            choices=Choices(roles, score, below),
            keep_accepted=keep_accepted,
            redact=redact,
            encoding=encoding,
            overwrite=overwrite,
            progress=lambda count: show(f"{count:,} rows"),
        )
    report.source = ", ".join(source)
    print_report(report.lines(), report.as_dict() if as_json else None)
    print_next("data", "validate", output)


def _fetch(sources: list[str], format: str, opened: ExitStack) -> tuple[list[str], str]:
    """The rows of a service in a temporary file, and their format."""
    import tempfile
    from pathlib import Path

    from buleyean_rl.live.connect.sync import fetch_rows, is_service

    source, *others = sources
    if others:
        raise UsageError("a service is imported by itself: leave the other sources out")
    if not is_service(source):
        raise UsageError(f"{source}: there are openwebui:URL, langfuse:URL and langsmith:URL")
    rows = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "rows.jsonl"
    own = fetch_rows(source, rows)
    return [str(rows)], own if format == "auto" else format


@app.command("validate", short_help="Report what training would use of a records file.")
def data_validate(
    path: Annotated[str, typer.Argument(metavar="RECORDS", help="A records file.")],
    model: Annotated[
        str | None,
        typer.Option(help="Count tokens, too, by this model's tokenizer: a name, a Hub id, a folder or a GGUF."),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of a prompt and one answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Report what training would use, fold, truncate and drop; exit 1 if the file cannot be trained on."""
    from buleyean_rl.system.progress import working

    with working(stderr_console(), f"checking {path}") as show:
        from buleyean_rl.data.encode import Encoder, describe_template, make_measure
        from buleyean_rl.data.records import validate_records
        from buleyean_rl.models.weights import check_trainable, load_tokenizer

        if model is not None:
            check_trainable(model)
        tokenizer = load_tokenizer(model) if model is not None else None
        measure = make_measure(Encoder(tokenizer, max_length)) if tokenizer is not None else None
        report = validate_records(
            path, measure=measure, max_length=max_length, progress=lambda count: show(f"{count:,} records")
        )
    if report.tokens is not None:
        report.tokens.remarks = describe_template(tokenizer)
    print_report(report.lines(), report.as_dict() if as_json else None)
    if not report.usable:
        raise typer.Exit(1)
    print_next("train", path, "--model", model or BUNDLED_MODEL, "-o", "my-run")
