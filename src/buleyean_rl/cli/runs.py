"""`buleyean runs`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buleyean_rl.cli.options import BUNDLED_MODEL, AsJson, print_json, print_next, print_report
from buleyean_rl.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from buleyean_rl.training.runs import RunSummary

PIPE_WIDTH = 1000  # columns: nothing is broken


def runs(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH", help="Run folders, or folders above them; default: here.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show in what two or more runs differ.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete these runs, and nothing else in them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """List, compare or delete runs of `train`."""
    if compare and delete:
        raise UsageError("--compare and --delete: one at a time")
    if yes and not delete:
        raise UsageError("--yes confirms --delete, which is missing")
    folders = [Path(path) for path in paths or []]
    if delete:
        _delete(folders, yes, as_json)
    else:
        _show(folders or [Path(".")], compare, as_json)


def _show(folders: Sequence[Path], compare: bool, as_json: bool) -> None:
    from buleyean_rl.training.runs import differing_settings, find_runs, summarise

    found = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    summaries = [summarise(run) for run in found]
    if compare and len(found) < 2:
        raise UsageError(f"--compare takes two or more runs, and there {'is 1' if found else 'are none'}")
    if as_json:
        differing = {"differing": differing_settings(summaries)} if compare else {}
        print_json({"runs": [summary.as_dict() for summary in summaries], **differing}, True)
    elif not found:
        print_report([f"no runs in {', '.join(map(str, folders))}"], None)
        print_next("train", "RECORDS", "--model", BUNDLED_MODEL, "-o", "my-run")
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else PIPE_WIDTH
        Console(width=width, highlight=False).print(_comparison(summaries) if compare else _list(summaries))
        _print_next(summaries, compare)


def _print_next(summaries: Sequence[RunSummary], compare: bool) -> None:
    """What people do with runs: measure those compared, talk to the newest."""
    finished = [run for run in summaries if run.state == "finished"]
    if compare and len(finished) > 1:
        others = [word for run in finished[1:] for word in ("--compare", run.folder)]
        print_next("evaluate", finished[0].folder, *others)
    elif finished:
        print_next("chat", max(finished, key=lambda run: run.date).folder)


def _list(summaries: Sequence[RunSummary]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("run", "model", "date", "steps", "rejected, nats", "KL"):
        table.add_column(name, overflow="fold")
    for run in summaries:
        cells = (str(run.folder), run.model, run.date, _steps(run), _nats(run), _kl(run))
        table.add_row(*map(Text, cells))
    return table


def _comparison(summaries: Sequence[RunSummary]) -> Table:
    """Runs as columns."""
    from rich.table import Table
    from rich.text import Text

    from buleyean_rl.training.runs import differing_settings

    table = Table(box=None, pad_edge=False)
    for name in ("", *(str(run.folder) for run in summaries)):
        table.add_column(Text(name), overflow="fold")
    rows = {
        "model": [run.model for run in summaries],
        "date": [run.date for run in summaries],
        "records": ["" if run.records is None else f"{run.records:,}" for run in summaries],
        "steps": [_steps(run) for run in summaries],
        "rejected tokens, nats": [_nats(run) for run in summaries],
        "neutral text, KL": [_kl(run) for run in summaries],
    }
    for name, values in differing_settings(summaries).items():
        rows[name] = ["null" if value is None else str(value) for value in values]
    for name, cells in rows.items():
        table.add_row(*map(Text, (name, *cells)))
    return table


def _steps(run: RunSummary) -> str:
    if run.state == "finished":
        return f"{run.steps:,}"
    return run.state if run.steps is None else f"{run.state} at {run.steps:,} of {run.total_steps:,}"


def _nats(run: RunSummary) -> str:
    if run.rejected_nll_base is None or run.rejected_nll_final is None:
        return ""
    return f"{run.rejected_nll_base:.2f} -> {run.rejected_nll_final:.2f}"


def _kl(run: RunSummary) -> str:
    return "" if run.kl is None else f"{run.kl:.3f}"


def _delete(folders: Sequence[Path], yes: bool, as_json: bool) -> None:
    from buleyean_rl.training.runs import check_deletable, delete_run

    if not folders:
        raise UsageError("--delete: name the run folders")
    for folder in folders:
        check_deletable(folder)
    print_report([f"run {folder}" for folder in folders], None)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("stdin is not a terminal to confirm on: add --yes to delete")
        typer.confirm("delete?", abort=True, err=True)
    left = {str(folder): [str(path) for path in delete_run(folder)] for folder in folders}
    for name, others in left.items():
        stays = f"; left there, as no run wrote it: {', '.join(others)}" if others else ""
        print_report([f"deleted: {name}{stays}"], None)
    print_json({"deleted": list(left), "left": [path for others in left.values() for path in others]}, as_json)
