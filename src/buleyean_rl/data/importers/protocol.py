"""What an importer is: a `Format`, which turns one row into the records in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from buleyean_rl.data.records import Prompt, RejectionRecord, Row
from buleyean_rl.errors import UsageError

COLUMN_ROLES = ("prompt", "answer", "score", "system")
MAX_REASONS = 30  # told apart; further ones are counted as one
MAX_REASON = 60  # characters


@dataclass
class Discards:
    """What importing left out on purpose, and what it read otherwise than it stands there.

    Args:
        chosen_discarded: answers that were chosen, accepted, or never rejected.
        ties: pairs of answers with equal scores, which are no rejection.
        without_rejection: rows in which nothing was rejected.
        unrated: those of them in which no answer was rated.
        duplicates_folded: rejected answers that repeat another one of their row.
        same_as_chosen: rows that reject the very text they choose.
        unusable: reason -> sound rows that training on text cannot use, such as a rejected call of a tool.
        context_dropped: key -> rows that were imported without what they have under it.
        parsed_texts: conversations that stood in the data as text.
        reasoning_removed: rejected answers whose reasoning was taken out.
        edited: answers that a person edited later, imported as the model wrote them.
    """

    chosen_discarded: int = 0
    ties: int = 0
    without_rejection: int = 0
    unrated: int = 0
    duplicates_folded: int = 0
    same_as_chosen: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    context_dropped: dict[str, int] = field(default_factory=dict)
    parsed_texts: int = 0
    reasoning_removed: int = 0
    edited: int = 0

    def note_unusable(self, reason: str) -> None:
        """Count a row that is left out."""
        _count(self.unusable, reason)

    def note_context(self, keys: Iterable[str]) -> None:
        """Count a row that is imported without what it has under some keys."""
        for key in keys:
            _count(self.context_dropped, key[:MAX_REASON])


def _count(counts: dict[str, int], reason: str) -> None:
    key = reason if reason in counts or len(counts) < MAX_REASONS else "other"
    counts[key] = counts.get(key, 0) + 1


@dataclass(frozen=True)
class Choices:
    """The user's reading of rows that are ambiguous.

    Args:
        columns: role -> the column that has it; roles are `COLUMN_ROLES`.
        score: the score that counts, where a trace has several.
        below: a score below it is a rejection; None: scores are labels between -1 and 1.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    score: str | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        unknown = set(self.columns) - set(COLUMN_ROLES)
        if unknown:
            raise UsageError(f"no role {', '.join(sorted(unknown))}: a column may be {', '.join(COLUMN_ROLES)}")
        missing = {"prompt", "answer"} - set(self.columns)
        if self.columns and missing:
            raise UsageError(f"no column for {' and '.join(sorted(missing))}: add --column {min(missing)}=NAME")
        if self.below is not None and not math.isfinite(self.below):
            raise UsageError(f"--below {self.below}: it must be a number")


NO_CHOICES = Choices()


@dataclass(frozen=True)
class Preference:
    """A prompt and answers to it, ranked by how often each was rejected. For measuring only, never trained on.

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

    def without_blank(self) -> Preference:
        """The same without answers that are blank."""
        filled = [k for k, answer in enumerate(self.answers) if answer.strip()]
        answers, rejections = tuple(self.answers[k] for k in filled), tuple(self.rejections[k] for k in filled)
        return replace(self, answers=answers, rejections=rejections)


@dataclass(frozen=True)
class Format:
    """One shape of row, and how it is read.

    A reader checks only what it uses: an accepted answer that is no text is passed over. What it leaves out on
    purpose it counts in `Discards`.

    Args:
        name: for `--format`.
        keys: the keys a row of it has, for error messages.
        matches: whether a row looks like it.
        read_records: the records of a row.
        read_preference: the ranking in a row, chosen answers included; None where a row tells of rejections alone.
        one_answer_a_row: rows of one prompt are one preference.
        keeps_accepted: whether answers are the judged model's own, so that accepted ones anchor unless told otherwise.
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    read_records: Callable[[Row, Discards, Choices], Iterator[RejectionRecord]]
    read_preference: Callable[[Row], Preference] | None = None
    one_answer_a_row: bool = False
    keeps_accepted: bool = False
