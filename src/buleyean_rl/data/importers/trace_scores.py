"""The scores of a trace, wherever its tool keeps them, as verdicts: rejected or not, how often each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from buleyean_rl.data.importers.protocol import Choices
from buleyean_rl.data.importers.scores import is_rating_word, is_rejection
from buleyean_rl.data.records import Row
from buleyean_rl.data.records.values import fail, parse_integer

SCORE_KEYS = ("scores", "feedback", "feedback_stats", "score", "rating")
# What Langfuse's page exports beside the scores, which stand there under their own names.
_EXPORT_KEYS = frozenset({"tags", "traceTags", "comments", "toolCalls", "toolCallNames", "toolDefinitions"})
MAX_RATINGS = 32  # of one name on one trace; a longer list of numbers is an embedding, or tokens


@dataclass(frozen=True)
class Verdicts:
    """How often a trace was rejected, of how many ratings.

    Args:
        rejections: bad ratings.
        rounds: ratings; 0 where nobody rated it.
    """

    rejections: int
    rounds: int


def read_verdicts(row: Row, choices: Choices) -> Verdicts:
    """The ratings of a trace that count.

    Raises:
        RecordError: it has scores of several names and none is chosen; or a score that is none.
    """
    scores = [(name, value, number) for name, value, number in _iterate_scores(row) if not _is_blank(value)]
    if choices.score is not None:
        scores = [score for score in scores if score[0] == choices.score]
    names = sorted({name for name, _, _ in scores})
    if len(names) > 1:
        fail(f"has the scores {', '.join(names)}: choose one with --score")
    rejections = rounds = 0
    for name, value, number in scores:
        verdict = is_rejection(value, choices.below, f"the score {name}")
        if verdict is None:
            continue
        share = _share_accepted(value, number, choices)
        rounds += number
        rejections += number * verdict if share is None else number - round(share * number)
    return Verdicts(rejections, rounds)


def _share_accepted(value: Any, number: int, choices: Choices) -> float | None:
    """Of a mean of several labels of 0 and 1, the share that accepts; None for anything else."""
    is_mean = number > 1 and choices.below is None and isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_mean and 0 <= value <= 1 else None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _iterate_scores(row: Row) -> Iterator[tuple[str, Any, int]]:
    """(name, value, how many ratings it stands for).

    Langfuse's interface has a list `scores`, its page a column of a list for each name; LangSmith `feedback_stats`
    with means and counts by name, or a list `feedback`; LibreChat one `feedback` with a rating.
    """
    single = [score for key in ("scores", "feedback") for score in _read_scores(row.get(key), key)]
    yield from single
    counted_names = {name for name, _, _ in single}  # their statistics are of the same ratings
    stats = row.get("feedback_stats")
    for name, entry in stats.items() if isinstance(stats, Mapping) else ():
        if isinstance(entry, Mapping) and str(name) not in counted_names:
            yield from _read_stats(str(name), entry)
    for key in ("score", "rating"):
        if row.get(key) is not None:
            yield key, row[key], 1
    for name, value in row.items():
        if name not in _EXPORT_KEYS and name not in SCORE_KEYS and _is_list_of_ratings(value):
            yield from ((name, item, 1) for item in value)


def _read_scores(scores: Any, key: str) -> Iterator[tuple[str, Any, int]]:
    if isinstance(scores, Mapping):
        if "rating" in scores:
            yield "rating", scores["rating"], 1
        else:
            for name, value in scores.items():
                yield from ((str(name), item, 1) for item in (value if isinstance(value, list) else [value]))
    elif isinstance(scores, list):
        for entry in scores:
            if isinstance(entry, Mapping):
                name = next((entry[key] for key in ("name", "key") if entry.get(key)), "score")
                yield str(name), _pick_value(entry), 1
            else:
                yield key, entry, 1
    elif scores is not None:
        yield key, scores, 1


def _pick_value(entry: Mapping[str, Any]) -> Any:
    """What one score says: a category's number is only its place in a list, so its word decides."""
    word = next((entry[key] for key in ("stringValue", "string_value") if not _is_blank(entry.get(key))), None)
    kind = next((entry[key] for key in ("dataType", "data_type") if isinstance(entry.get(key), str)), "")
    value, score = entry.get("value"), entry.get("score")
    if word is not None and (kind.upper() in ("CATEGORICAL", "BOOLEAN") or is_rating_word(word)):
        return word
    if is_rating_word(value):  # LangSmith: the category beside a number
        return value
    numbers = [item for item in (score, value, entry.get("rating")) if item is not None]
    return numbers[0] if numbers else word


def _read_stats(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """LangSmith's statistics of one name: a count for each category, or a mean and a count."""
    values, number, mean = entry.get("values"), entry.get("n"), entry.get("avg")
    if isinstance(values, Mapping) and values:
        for word, count in values.items():
            yield name, word, parse_integer(count, f"a count of the score {name}", 0)
    elif mean is not None:
        yield name, mean, 1 if number is None else parse_integer(number, f"the count of the score {name}", 0)


def _is_list_of_ratings(value: Any) -> bool:
    """Whether a value is a short list of numbers, or of words that rate."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_RATINGS:
        return False
    return all(isinstance(item, int | float) for item in value) or all(map(is_rating_word, value))
