"""The table of all benchmarks, `bench/results.csv`: a row a figure; a run replaces the rows of its processor.

python bench/results.py [BENCHMARK ...]        as Markdown, a column a processor
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).with_name("results.csv")
COLUMNS = (
    *("processor", "benchmark", "subject", "figure", "value", "low", "high", "repeats"),
    *("precision", "torch", "commit", "date", "command"),
)
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def add_arguments(parser: argparse.ArgumentParser, default_processor: str) -> None:
    """What every benchmark is told about its table."""
    parser.add_argument("--processor", default=default_processor, help="whose rows are replaced (%(default)s)")
    parser.add_argument("--output", type=Path, default=TABLE, help="the table (%(default)s)")


def processor() -> str:
    """The widest of the vector instructions that matter here, and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    features = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    instructions = next((name for flag, name in INSTRUCTIONS.items() if flag in features), platform.machine())
    return f"{instructions}, {os.cpu_count()} cores"


def figure(subject: str, name: str, values: float | Sequence[float], *, largest: bool = False) -> dict[str, str]:
    """A row: the median of repeated values, their least and their most.

    Args:
        subject: what was measured.
        name: of the figure, with its unit.
        values: one a repeat.
        largest: give the largest instead of the median.
    """
    repeats = [values] if isinstance(values, float | int) else list(values)
    value = max(repeats) if largest else statistics.median(repeats)
    row = {"subject": subject, "figure": name, "value": f"{value:.6g}", "repeats": str(len(repeats))}
    return row | ({"low": f"{min(repeats):.6g}", "high": f"{max(repeats):.6g}"} if len(repeats) > 1 else {})


def replace(benchmark: str, rows: Sequence[dict[str, str]], processor: str, precision: str, path: Path = TABLE) -> None:
    """Put a benchmark's rows in the place of those that this processor had.

    Args:
        benchmark: its script's name, and which of its parts ran, where each has rows of its own.
        rows: as `figure` makes them.
        processor: which.
        precision: what was computed in.
        path: of the table.
    """
    origin = {
        "processor": processor,
        "benchmark": benchmark,
        "precision": precision,
        "torch": version("torch"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            [f"python bench/{benchmark.split()[0]}.py", *(Path(argument).name for argument in sys.argv[1:])]
        ),
    }
    others = [row for row in read(path) if (row["processor"], row["benchmark"]) != (processor, benchmark)]
    write([*others, *(origin | row for row in rows)], path)


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The rows of a table; none where there is no table yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(rows: Sequence[dict[str, str]], path: Path = TABLE) -> None:
    """Write a table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    """The code's commit, with a plus sign where files differ from it; nothing outside a repository."""
    command = ["git", "-C", str(TABLE.parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A benchmark's rows, a column a processor."""
    processors = list(dict.fromkeys(row["processor"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["subject"], row["figure"]), {})[row["processor"]] = _cell(row)
    lines = [["", "", *processors], ["---"] * (2 + len(processors))]
    lines += [[*key, *(row.get(name, "") for name in processors)] for key, row in cells.items()]
    origins = dict.fromkeys(
        f"{row['processor']}: `{row['command']}`, {row['precision']}, {row['date']}" for row in rows
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {line}" for line in origins), ""])


def _cell(row: dict[str, str]) -> str:
    """A value and, where there are several, the least and the most; bytes in MB."""
    value, low, high = (
        "" if not row[name] else _readable(row["figure"], row[name]) for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})" if low != high else value


def _readable(figure: str, value: str) -> str:
    if not value:
        return ""
    return f"{float(value) / 1e6:.4g} MB" if figure.endswith("bytes") else f"{float(value):.4g}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK")
    rows = read()
    for benchmark in parser.parse_args().benchmarks or dict.fromkeys(row["benchmark"] for row in rows):
        print(f"{benchmark}\n\n{markdown([row for row in rows if row['benchmark'] == benchmark])}")


if __name__ == "__main__":
    main()
