"""The command `buleyean`.

A command reads its options, calls one function of the package and prints the result: on stderr for people, with
`--json` one object on stdout. Slow imports are inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper, UnsupportedOperation
from itertools import pairwise
from typing import Annotated, Any

import typer

from buleyean_rl.cli import apps, data, doctor, evaluate, export, live, mine, runs, train
from buleyean_rl.cli.options import INTERRUPTED, Interrupted
from buleyean_rl.errors import BuleyeanError, UsageError
from buleyean_rl.system import environment  # noqa: F401 - before torch
from buleyean_rl.system.cache import sweep_cache
from buleyean_rl.system.disk import full_disk
from buleyean_rl.system.program import command_line

app = typer.Typer(
    name="buleyean",
    help="Fine-tune an open language model from rejections alone, and chat with the result.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TEXTS = ("--prompt", "--system", "--message")  # options whose value may be empty
GO_ON_ALONE = ("mine", "walk")  # stopped, the same command goes on

app.add_typer(data.app, name="data", short_help="Import data as rejection records; validate them.")
for command, line in (  # which has room in 80 columns
    (apps.demo, "Run the main job on bundled model and data, start to end."),
    (train.train, "Fine-tune a model on rejections; writes a run folder."),
    (runs.runs, "List, compare or delete runs."),
    (export.export, "Write a run as a GGUF file, checked in llama.cpp."),
    (apps.chat, "Talk to a run or a model, and reject its answers."),
    (evaluate.evaluate, "Measure a model: rejections, drift, loops."),
    (export.push, "Upload a run, GGUF files or records to the Hub."),
    (mine.mine, "Let a model answer prompts; write rejected answers as records."),
    (mine.walk, "Mine, train, measure; repeat with the trained model."),
    (apps.void, "Serve a page to chat, reject answers, and train."),
    (live.serve, "Serve a model by the OpenAI API."),
    (live.swap, "Let another run answer at a running server."),
    (live.connect, "Fetch rated answers from where people rate them."),
    (doctor.doctor, "Report what this machine computes with, what is missing."),
):
    app.command(short_help=line)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: after `buleyean`; None for those of the process.

    Returns:
        The exit code: 0 done, 1 bad input or result, 2 wrong usage, 130 interrupted.
    """
    _open_standard_streams()
    argument_list = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argument_list  # at any position
    argument_list = [word for word in argument_list if word != "--debug"]
    try:
        _refuse_empty(argument_list)
        code = app(args=argument_list, prog_name="buleyean", standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        _flush_stdout()
        return code
    except (KeyboardInterrupt, Interrupted) as stop:
        with suppress(OSError):
            print(_describe_stop(stop, argument_list), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has ended, as `head` does
        sys.stdout = None
        return 1
    except Exception as error:
        if debug:
            raise
        problem = _describe_error(error)
        if problem is None:
            raise
        with suppress(OSError):
            _flush_stdout()
        print(f"error: {problem[0]}", file=sys.stderr)
        return problem[1]


def _open_standard_streams() -> None:
    """Open those that are closed on nothing, and let all of them take any text.

    The next file would take the place of a closed one, and get what C code prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):  # what it cannot encode is no reason to stop
            with suppress(UnsupportedOperation):  # it was read from before
                stream.reconfigure(errors="backslashreplace" if number else "replace")


def _flush_stdout() -> None:
    """Write what is printed, while a failure can still be told.

    Raises:
        OSError: its reader has ended, or its disk is full.
    """
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None  # or Python would flush it at exit
        raise


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty path or number, which would be read as the current folder or as left out."""
    for before, word in pairwise(["", *arguments]):
        name, equals, value = word.partition("=")
        is_empty = not word or (name.startswith("-") and equals and not value)
        option = name if equals else before if before.startswith("-") else "an argument"
        if is_empty and option not in TEXTS:
            raise UsageError(f"{option} is empty: give a value")


def _describe_stop(stop: BaseException, words: list[str]) -> str:
    """Where a stopped command stands, and how it goes on.

    Args:
        stop: with a message, and the words that the command needs to go on, if it can.
        words: of the command.
    """
    message, *more = stop.args or ("",)
    if not more and words[:1] not in ([name] for name in GO_ON_ALONE):
        return f"stopped: {message}" if message else "stopped"
    words = [*words, *(word for word in more if word not in words)]
    where = f"stopped: {message}. " if message else ""
    return f"{where}Go on with: {command_line(*words)}"


def _describe_error(error: Exception) -> tuple[str, int] | None:
    """An error as a message and an exit code; None for a bug, which needs its traceback."""
    if isinstance(error, BuleyeanError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", INTERRUPTED
    if isinstance(error, MemoryError):
        return str(error) or "not enough memory", 1
    if (number := full_disk(error)) is not None and not isinstance(error, OSError):
        return f"a disk is full: {os.strerror(number)}", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    # the base class of usage errors, which typer does not export
    if isinstance(error, typer.BadParameter.__mro__[1]):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "buleyean"
        problem = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        problem += _nearest_option(error, context)
        return f"{problem}{'' if problem.endswith('?') else '.'} See `{command} --help`.", 2
    return None


def _nearest_option(error: Exception, context: Any) -> str:
    """A question after the name of an option that there is not, where no option is spelled nearly so.

    By the settings' own names: `--learning-rate` is `--lr`.
    """
    if context is None or getattr(error, "possibilities", True) or not hasattr(error, "option_name"):
        return ""
    name = error.option_name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, names := {p.name: p for p in context.command.params}, 1, 0.75)
    return f". Did you mean {names[near[0]].opts[0]}?" if near else ""


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
    else:
        sweep_cache()
