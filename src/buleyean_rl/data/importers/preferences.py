"""Other people's data -> preferences: what importing discards, kept, to measure a model with.

The shapes are those of `formats`, read by the same functions; here an answer that nobody rejected stays,
with a count of 0. A preference is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from buleyean_rl.data.importers.formats import Format, find_format
from buleyean_rl.data.importers.pairs import conversing, label_of, labelled_answer, pair_answers
from buleyean_rl.data.importers.ranked import answer_of, tallied
from buleyean_rl.data.importers.rows import Discards, prompt_of
from buleyean_rl.data.importers.run import rows_in
from buleyean_rl.data.records import Prompt, Row, parse_prompt, parse_text, pick, reject_row
from buleyean_rl.data.records.record import fail, kind_of
from buleyean_rl.errors import RecordError

ANSWERS = {"chosen", "rejected", "response", "completion", "text", "answer", "content"}


@dataclass(frozen=True)
class Preference:
    """A prompt and answers to it, ranked by how often each was rejected.

    Args:
        prompt: the user's text, or (role, content) messages.
        answers: in the order of the data; a text may stand here twice.
        rejections: v_k >= 0 of each; fewer is better.
        rounds: T >= max(v_k).
    """

    prompt: Prompt
    answers: tuple[str, ...]
    rejections: tuple[int, ...]
    rounds: int

    def pairs(self) -> list[tuple[int, int]]:
        """Every (better, worse) pair of answers, as their numbers."""
        numbered = list(enumerate(self.rejections))
        return [(i, j) for i, better in numbered for j, worse in numbered if better < worse]

    def without_empty(self) -> Preference:
        """The same without answers that are blank."""
        kept = [k for k, answer in enumerate(self.answers) if answer.strip()]
        answers, rejections = tuple(self.answers[k] for k in kept), tuple(self.rejections[k] for k in kept)
        return replace(self, answers=answers, rejections=rejections)


@dataclass(frozen=True)
class Preferences:
    """The preferences of a source.

    Args:
        format: the format it was read as.
        items: those with an answer left, in the order of the data.
        empty: answers left out as they are blank.
        skipped: bad rows left out.
    """

    format: str
    items: tuple[Preference, ...]
    empty: int = 0
    skipped: int = 0


def read_preferences(
    source: str, format: str = "auto", *, limit: int | None = None, skip_bad: bool = False
) -> Preferences:
    """Read a file, a folder or a Hub data set of anything that can be imported, and keep its chosen answers.

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
    skipped: list[RecordError] = []
    skip = skipped.append if skip_bad else False
    known, rows = rows_in(source, None if format == "auto" else find_format(format), skip_bad=skip)

    def converted() -> Iterator[Preference]:
        for place, row in rows:
            try:
                yield from _convert(known, row)
            except RecordError as error:
                reject_row(error, source, place, skip)

    found = _by_prompt(converted()) if known.name == "kto" else converted()
    read = list(islice(found, limit))
    kept = [preference.without_empty() for preference in read]
    empty = sum(map(_size, read)) - sum(map(_size, kept))
    items = tuple(preference for preference in kept if preference.answers)
    if not items:
        raise RecordError("has no answer to measure with", path=source)
    return Preferences(known.name, items, empty, len(skipped))


def _size(preference: Preference) -> int:
    return len(preference.answers)


def _convert(known: Format, row: Row) -> Iterator[Preference]:
    """The preferences in a row; where a format says nothing of good answers, only what is rejected."""
    if known.name in READERS:
        yield READERS[known.name](row)
        return
    for record in known.convert(row, Discards()):
        yield Preference(record.prompt, record.rejected_responses, record.rejection_counts, record.total_rounds)


def _pair(row: Row) -> Preference:
    row = conversing(_spelt(row))
    prompt, rejected = pair_answers(row)
    chosen = [] if pick(row, "chosen") is None else pair_answers(row, "chosen", "rejected")[1]
    answers = [*_texts(chosen, "chosen"), *_texts(rejected, "rejected")]
    return _preference(prompt, answers, [0] * len(chosen) + [1] * len(rejected), 1)


def _label(row: Row) -> Preference:
    prompt, answer = labelled_answer(_spelt(row))
    return _preference(prompt, [answer], [int(not label_of(row))], 1)


def _candidates(row: Row) -> Preference:
    candidates, tallies, rounds = tallied(row, Discards())
    answers = [answer_of(_spelt(candidate), k) for k, candidate in enumerate(candidates)]
    most = max(tallies, default=1)
    if rounds is None:
        rounds = max(most, 1)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < max(most, 1):
        fail(f"total_rounds is {kind_of(rounds)}: it must be a whole number, {max(most, 1)} or more")
    return _preference(prompt_of(row), answers, tallies, rounds)


READERS: dict[str, Callable[[Row], Preference]] = {
    "pairs": _pair,
    "kto": _label,
    "candidates": _candidates,
    "scored": _candidates,
}


def _spelt(row: Row) -> Row:
    """A row whose answers are texts though a table or a script made `true` or 42 of them."""
    return {
        key: json.dumps(value) if key in ANSWERS and isinstance(value, bool | int | float) else value
        for key, value in row.items()
    }


def _preference(prompt: object, answers: Sequence[str], rejections: Sequence[int], rounds: int) -> Preference:
    return Preference(parse_prompt(prompt), tuple(answers), tuple(rejections), rounds)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        fail(f"{name} is {kind_of(values)}: it must be text, a list of texts, or messages")
    return [parse_text(value, f"{name}[{k}]") for k, value in enumerate(values)]


def _by_prompt(preferences: Iterator[Preference]) -> Iterator[Preference]:
    """Verdicts on single answers -> one preference per prompt; an answer's verdicts add up."""
    verdicts: dict[Prompt, dict[str, list[int]]] = {}
    for preference in preferences:
        answers = verdicts.setdefault(preference.prompt, {})
        for answer, rejections in zip(preference.answers, preference.rejections, strict=True):
            answers.setdefault(answer, []).append(rejections)
    for prompt, by_answer in verdicts.items():
        # T is the most verdicts that one answer has; the others' counts keep their rates
        rounds = max(map(len, by_answer.values()))
        tallies = [round(sum(given) * rounds / len(given)) for given in by_answer.values()]
        yield Preference(prompt, tuple(by_answer), tuple(tallies), rounds)
