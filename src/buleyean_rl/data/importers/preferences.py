"""Other people's data as preferences: what importing discards, read too, to measure a model with.

    rows --Format.read_preference--> one ranking a row --labelled answers to one prompt together--> Preferences

A preference is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from buleyean_rl.data.importers.formats import find_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Discards, Format, Preference
from buleyean_rl.data.importers.sources import open_source
from buleyean_rl.data.records import Prompt, Row, handle_bad_row
from buleyean_rl.errors import RecordError, UnsupportedContent


@dataclass(frozen=True)
class Preferences:
    """The preferences of a source.

    Args:
        format: the format it was read as.
        items: those with an answer left, in the order of the data.
        empty: answers left out as they are blank.
        skipped: rows left out as they are bad, are more than text, or were rated by nobody.
    """

    format: str
    items: tuple[Preference, ...]
    empty: int = 0
    skipped: int = 0


def read_preferences(
    source: str, format: str = "auto", *, limit: int | None = None, skip_bad: bool = False
) -> Preferences:
    """Read a file, a folder or a Hub data set of anything that can be imported, with its chosen answers.

    Labelled answers (KTO) to one prompt are one preference, wherever in the file they stand.

    Args:
        source: see `open_rows`.
        format: a format's name; "auto" looks at the first rows.
        limit: the first so many preferences; None for all.
        skip_bad: leave bad rows out and count them, instead of stopping at the first.

    Raises:
        RecordError: with the place of a bad row; or there is no answer in the source.
        UsageError: no such format.
    """
    errors: list[RecordError] = []
    on_error = errors.append if skip_bad else False
    row_format, rows = open_source(source, None if format == "auto" else find_format(format), skip_bad=on_error)

    def read_rows() -> Iterator[Preference]:
        for line, row in rows:
            try:
                yield from _rank_row(row_format, row)
            except UnsupportedContent as error:
                errors.append(error)
            except RecordError as error:
                handle_bad_row(error, source, line, on_error)

    rankings = _merge_by_prompt(read_rows()) if row_format.one_answer_a_row else read_rows()
    with closing(rows):
        preferences = list(islice(rankings, limit))
    filled = [preference.without_blank() for preference in preferences]
    items = tuple(preference for preference in filled if preference.answers)
    if not items:
        raise RecordError("has no answer to measure with", path=source)
    return Preferences(row_format.name, items, _count_answers(preferences) - _count_answers(filled), len(errors))


def _count_answers(preferences: Iterable[Preference]) -> int:
    return sum(len(preference.answers) for preference in preferences)


def _rank_row(row_format: Format, row: Row) -> Iterator[Preference]:
    """The preferences in a row; where a format tells of rejections alone, those."""
    if row_format.read_preference is not None:
        yield row_format.read_preference(row)
        return
    for record in row_format.read_records(row, Discards(), NO_CHOICES):
        if not record.rejects:
            continue
        rounds = max(record.rounds)  # T is one number here: counts are scaled to it
        counts = tuple(round(answer.count * rounds / answer.rounds) for answer in record.entries())
        yield Preference(record.prompt, record.rejected_responses, counts, rounds)


def _merge_by_prompt(preferences: Iterable[Preference]) -> Iterator[Preference]:
    """Verdicts on single answers as one preference per prompt; an answer's verdicts add up."""
    verdicts: dict[Prompt, dict[str, list[int]]] = {}
    for preference in preferences:
        by_answer = verdicts.setdefault(preference.prompt, {})
        for answer, rejections in zip(preference.answers, preference.rejections, strict=True):
            by_answer.setdefault(answer, []).append(rejections)
    for prompt, by_answer in verdicts.items():
        # T is the largest number of verdicts on one answer; the others' counts are scaled to it
        rounds = max(map(len, by_answer.values()))
        counts = [round(sum(rejections) * rounds / len(rejections)) for rejections in by_answer.values()]
        yield Preference(prompt, tuple(by_answer), tuple(counts), rounds)
