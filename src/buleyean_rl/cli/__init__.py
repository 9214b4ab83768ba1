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
from buleyean_rl.cli.options import INTERRUPTED, Interrupted, print_line
from buleyean_rl.errors import BuleyeanError, ProcessError, UsageError
from buleyean_rl.system import environment  # noqa: F401 - before torch
from buleyean_rl.system.cache import sweep_cache
from buleyean_rl.system.disk import full_disk
from buleyean_rl.system.launcher import is_first, launched
from buleyean_rl.system.program import command_line

app = typer.Typer(
    name="buleyean",
    help="Fine-tune an open language model from rejections alone, and chat with the result.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TEXTS = ("--prompt", "--system", "--message")  # options whose value may be empty
STOPPED = {  # where a command stands that Ctrl-C ended
    "demo": "answers that were complete stay in the cache; the same command begins anew with them",
    "data": "nothing was written",
    "train": "nothing was trained yet; the same command begins anew",
    "export": "no file was written; the same command begins anew",
    "evaluate": "nothing was written; the same command begins anew",
    "mine": "what was answered and judged is kept",
    "walk": "what was answered, judged and trained is kept",
}
GO_ON_ALONE = ("mine", "walk")  # the same command goes on
TOGETHER = ("train", "mine")  # which several processes do together

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
            if is_first():
                _tell_stop(stop, argument_list)
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
        if not (isinstance(error, ProcessError) and error.is_told):
            print_line(f"error: {_name_process(error)}{problem[0]}")
        return problem[1]


def _name_process(error: Exception) -> str:
    """Which of several processes it is that fails."""
    with suppress(UsageError):  # the environment contradicts itself, which is the error
        if not isinstance(error, ProcessError) and (place := launched()) is not None:
            return f"process {place.rank} of {place.size}: "
    return ""


def _refuse_several(command: str) -> None:
    """Refuse to be one of several processes, which would write the same files: all of them exit, one says why."""
    place = launched()
    if place is None or command in TOGETHER:
        return
    if not is_first():
        raise typer.Exit(UsageError.exit_code)
    raise UsageError(
        f"{command} is one process, and {place.size} were started: run it without torchrun, srun or mpirun"
    )


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


def _tell_stop(stop: BaseException, words: list[str]) -> None:
    """Say where a stopped command stands, and how it goes on."""
    if sys.stderr.isatty():
        print(end="\r", file=sys.stderr)  # over the terminal's ^C
    line, command = _describe_stop(stop, words)
    print_line(line)
    if command is not None:
        print(f"Go on with: {command}", file=sys.stderr)  # whole, so that it can be copied


def _describe_stop(stop: BaseException, words: list[str]) -> tuple[str, str | None]:
    """Where a stopped command stands, and the command by which it goes on, if it can.

    Args:
        stop: with a message, and the words that the command needs to go on, if it can.
        words: of the command.
    """
    command = words[0] if words else ""
    message, *more = stop.args or (STOPPED.get(command, ""),)
    line = f"stopped: {message}" if message else "stopped"
    if not more and command not in GO_ON_ALONE:
        return line, None
    return line, command_line(*words, *(word for word in more if word not in words))


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
        _refuse_several(context.invoked_subcommand)
        sweep_cache()
