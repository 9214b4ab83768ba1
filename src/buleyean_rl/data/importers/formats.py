"""The shapes rejections come in, one small generator each: a row in, its records out.

A converter checks only what it uses: the text of an answer nobody rejected is never looked at. What it
leaves out on purpose it counts in `Discards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from buleyean_rl.data.importers.logs import DEFAULT, from_columns, from_trace
from buleyean_rl.data.importers.open_webui import from_open_webui
from buleyean_rl.data.importers.pairs import from_label, from_pair
from buleyean_rl.data.importers.ranked import from_candidates, from_scores
from buleyean_rl.data.importers.rows import Discards, _path
from buleyean_rl.data.importers.scores import Choices
from buleyean_rl.data.records import RejectionRecord, Row, parse_record, rejected_answers
from buleyean_rl.data.records.record import fail, keys_of
from buleyean_rl.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One shape of row.

    Args:
        name: what `--format` calls it.
        keys: the keys it is known by, for error messages.
        matches: whether a row looks like it.
        convert: the records of a row, given the row and the `Discards` to count in.
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[..., Iterator[RejectionRecord]]


def from_record(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Canonical records, and the data card's `rejected` without counts."""
    record = parse_record(row)
    discards.duplicates_folded += len(rejected_answers(row)) - len(record.rejected_responses)
    yield record


# The order is the order in which `auto` tries them.
FORMATS = (
    Format(
        "records",
        "prompt, rejected_responses (or rejected without chosen)",
        lambda row: (
            not row.keys().isdisjoint({"rejected_responses", "rejectedResponses"})
            or ("rejected" in row and "chosen" not in row)
        ),
        from_record,
    ),
    Format("pairs", "prompt, chosen, rejected", lambda row: {"chosen", "rejected"} <= row.keys(), from_pair),
    Format(
        "kto",
        "messages (or prompt, completion), label",
        lambda row: "label" in row and not row.keys().isdisjoint({"messages", "completion", "response"}),
        from_label,
    ),
    Format(
        "candidates",
        "prompt, candidates[response, rejection_count or score]",
        lambda row: isinstance(row.get("candidates"), list),
        from_candidates,
    ),
    Format(
        "scored",
        "prompt, completions[response, score]",
        lambda row: (
            isinstance(row.get("completions"), list) or (isinstance(row.get("responses"), list) and "scores" in row)
        ),
        from_scores,
    ),
    Format(
        "openwebui",
        "data.rating, meta.message_id, snapshot.chat; or chat.history",
        lambda row: _path(row, "data", "rating") is not None or _path(row, "chat", "history") is not None,
        from_open_webui,
    ),
    Format(
        "traces",
        "input, output, scores[name, value] (or feedback_stats, score)",
        lambda row: (
            not row.keys().isdisjoint({"input", "inputs"})
            and not row.keys().isdisjoint({"output", "outputs"})
            and not row.keys().isdisjoint({"scores", "score", "feedback", "feedback_stats"})
        ),
        from_trace,
    ),
    Format("columns", "those that --column names", lambda _row: False, from_columns),
)


def find_format(name: str, choices: Choices = DEFAULT) -> Format:
    """The format of a name.

    Args:
        name: of one of `FORMATS`.
        choices: what the user says of the rows.

    Raises:
        UsageError: there is none; says which there are. Or it needs columns, and none are named.
    """
    for known in FORMATS:
        if known.name == name:
            return _choosing(known, choices)
    raise UsageError(f"no format {name!r}: choose auto, {', '.join(known.name for known in FORMATS)}")


def detect_format(rows: Sequence[Row], choices: Choices = DEFAULT) -> Format:
    """The format of the first row that looks like one; `columns` where the user names some.

    Args:
        rows: some rows from the start of the data.
        choices: what the user says of the rows.

    Raises:
        RecordError: none does; says which keys the first row has and which formats there are.
    """
    if choices.columns:
        return find_format("columns", choices)
    for row in rows:
        for known in FORMATS:
            if known.matches(row):
                return _choosing(known, choices)
    known_formats = "; ".join(f"{known.name}: {known.keys}" for known in FORMATS)
    seen = f"its first row has the keys {keys_of(rows[0])}" if rows else "it has no good row"
    fail(f"is in no known format: {seen}.\nKnown are {known_formats}")


def _choosing(known: Format, choices: Choices) -> Format:
    """A format that goes by the user's choices, if it asks for any."""
    if known.name == "columns" and not choices.columns:
        raise UsageError("the format `columns` needs their names: --column prompt=NAME --column answer=NAME")
    if known.name in ("columns", "traces"):
        return replace(known, convert=partial(known.convert, choices=choices))
    return known
