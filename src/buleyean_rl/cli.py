"""The command: arguments in, one call, a report out.

A command here reads its options, calls one function of the package and prints what comes back: for a
person on stderr, or with `--json` one object on stdout. Everything heavy is imported inside the command
that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from buleyean_rl.errors import BuleyeanError

app = typer.Typer(
    name="buleyean",
    help="Fine-tune an open language model from rejections alone, and chat with the result.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Turn other people's data into rejection records, and check them.", rich_markup_mode=None)
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after `buleyean`; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 the input or the result is bad, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands: one adds it to the end of a line
    words = [word for word in words if word != "--debug"]
    try:
        return app(args=words, prog_name="buleyean", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stdout = None  # or Python would try to flush it on its way out
        return 1
    except Exception as error:
        if debug:
            raise
        problem = _explain(error)
        if problem is None:
            raise
        print(f"error: {problem[0]}", file=sys.stderr)
        return problem[1]


def _explain(error: Exception) -> tuple[str, int] | None:
    """An error as a message and an exit code; None where it is a bug of ours, which deserves its traceback."""
    if isinstance(error, BuleyeanError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", 130
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    # typer carries its own copy of click, whose base of wrong usage has no public name.
    if isinstance(error, typer.BadParameter.__mro__[1]):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "buleyean"
        problem = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return f"{problem}. See `{command} --help`.", 2
    return None


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from buleyean_rl import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .jsonl or .json file, or a Hub data set id.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The records file to write.")],
    format: Annotated[str, typer.Option(help="auto, records, pairs, kto, scored, candidates or openwebui.")] = "auto",
    split: Annotated[str | None, typer.Option(help="The split of a Hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop once there are so many records.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of stopping.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn pairs, labels, scores or an export into a records file. Chosen answers are discarded."""
    from buleyean_rl.importers import import_records

    with _counting("rows read") as progress:
        report = import_records(
            source, output, format=format, split=split, limit=limit, skip_bad=skip_bad, progress=progress
        )
    _report(report.lines(), report.as_dict() if as_json else None)


@data_app.command("validate")
def data_validate(
    path: Annotated[str, typer.Argument(metavar="RECORDS", help="A records file.")],
    model: Annotated[
        str | None, typer.Option(help="Count its tokens too: a name, a Hub id, a folder or a GGUF.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="The most tokens of a prompt and one answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Say what training would use, fold, cut and drop; exit 1 if the file cannot be trained on."""
    from buleyean_rl.records import validate_records

    measure = _measure(model) if model is not None else None
    with _counting("records checked") as progress:
        report = validate_records(path, measure=measure, max_length=max_length, progress=progress)
    _report(report.lines(), report.as_dict() if as_json else None)
    if not report.usable:
        raise typer.Exit(1)


def _measure(model: str) -> Callable[[Any], tuple[int, list[list[bool]]]]:
    """What `validate_records` counts tokens with: the tokenizer as training uses it."""
    from buleyean_rl.boundary import encode_prompt, encode_response
    from buleyean_rl.models import load_tokenizer
    from buleyean_rl.records import RejectionRecord

    tokenizer = load_tokenizer(model)

    def measure(record: RejectionRecord) -> tuple[int, list[list[bool]]]:
        answers = zip(record.rejected_responses, record.rejected_spans, strict=True)
        return len(encode_prompt(tokenizer, record.prompt)), [
            encode_response(tokenizer, text, spans)[1] for text, spans in answers
        ]

    return measure


def _report(lines: Sequence[str], as_json: dict[str, Any] | None) -> None:
    """Print a report: the lines on stderr, the JSON object, if wanted, on stdout."""
    for line in lines:
        print(line, file=sys.stderr)
    if as_json is not None:
        print(json.dumps(as_json, allow_nan=False))


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int], object] | None]:
    """A running count on stderr, if somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda count: status.update(f"{count:,} {what}")
