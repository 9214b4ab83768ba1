"""The table of formats, and which one a source is in.

A new format is a file that makes a `Format`, and its line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from buleyean_rl.data.importers import canonical, columns, labels, librechat, open_webui, pairs, ranked, traces
from buleyean_rl.data.importers.names import simplify_names
from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Format
from buleyean_rl.data.importers.suggest import suggest_columns
from buleyean_rl.data.records import Row
from buleyean_rl.data.records.values import fail, list_keys
from buleyean_rl.errors import UsageError

# `auto` tries them in this order.
FORMATS = (
    canonical.RECORDS,
    pairs.PAIRS,
    librechat.LIBRECHAT,
    labels.KTO,
    ranked.CANDIDATES,
    ranked.SCORED,
    open_webui.OPEN_WEBUI,
    traces.TRACES,
    columns.COLUMNS,
)


def find_format(name: str, choices: Choices = NO_CHOICES) -> Format:
    """The format of a name.

    Args:
        name: of one of `FORMATS`.
        choices: the user's reading of the rows.

    Raises:
        UsageError: there is none; says which there are. Or it needs columns, and none are named.
    """
    if name == columns.COLUMNS.name and not choices.columns:
        raise UsageError("the format `columns` needs their names: --column prompt=NAME --column answer=NAME")
    for format in FORMATS:
        if format.name == name:
            return format
    raise UsageError(f"no format {name!r}: choose auto, {', '.join(format.name for format in FORMATS)}")


def detect_format(rows: Sequence[Row], choices: Choices = NO_CHOICES) -> Format:
    """The format of the first row that looks like one, if need be by simplified names; `columns` where some are named.

    Args:
        rows: some rows from the start of the data.
        choices: the user's reading of the rows.

    Raises:
        RecordError: none does; says which keys the first row has and which formats there are.
    """
    if choices.columns:
        return columns.COLUMNS
    for row in (*rows, *map(simplify_names, rows)):
        for format in FORMATS:
            if format.matches(row):
                return format
    if not rows:
        fail("is in no known format: it has no good row")
    known_formats = "; ".join(f"{format.name}: {format.keys}" for format in FORMATS)
    fail(
        f"is in no known format: its first row has the keys {list_keys(rows[0])}. Say which hold what, such as "
        f"{suggest_columns(rows[0])}\nKnown are {known_formats}"
    )
