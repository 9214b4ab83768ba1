"""How much answers repeat themselves, each other or another text.

text --UNIT--> words and marks --> 4-grams --> shares and spans of repeats
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# A unit is a word, a punctuation mark, or a character of a script without spaces.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
LOOP_THRESHOLD = 0.3  # share of repeated 4-grams above which an answer loops
NGRAM = 4


def repeated_spans(text: str) -> list[tuple[int, int]]:
    """Where a text repeats itself: the characters of every 4-gram that occurred before.

    A gram's units are words and single punctuation marks, so the measure is the same for every tokenizer.

    Args:
        text: an answer.

    Returns:
        Disjoint [start, end) spans in order.
    """
    spans: list[tuple[int, int]] = []
    for start, end, is_repeat in _located_ngrams(text):
        if not is_repeat:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def repetition(text: str) -> float:
    """Share of a text's 4-grams that occurred before in it, between 0 and 1."""
    repeats = [is_repeat for _, _, is_repeat in _located_ngrams(text)]
    return sum(repeats) / len(repeats) if repeats else 0.0


def is_looping(text: str) -> bool:
    """Whether more than 30% of a text's 4-grams are repeats."""
    return repetition(text) > LOOP_THRESHOLD


def loop_rate(answers: Sequence[str]) -> float:
    """Share of answers that loop."""
    return sum(map(is_looping, answers)) / len(answers)


def distinct(answers: Sequence[str]) -> float | None:
    """Different 4-grams of some answers over all their 4-grams; None where there is no 4-gram."""
    grams = [gram for answer in answers for gram in _ngrams(answer)]
    return len(set(grams)) / len(grams) if grams else None


def overlap(answer: str, text: str) -> float:
    """Share of an answer's 4-grams that a text has too; 0 where the answer has none."""
    grams, text_grams = _ngrams(answer), set(_ngrams(text))
    return sum(gram in text_grams for gram in grams) / len(grams) if grams else 0.0


def prefix_match(answer: str, text: str) -> float:
    """How far two texts begin alike: units in common from the start, over those of the shorter one."""
    pairs = list(zip(_units(answer), _units(text), strict=False))
    common = next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return common / len(pairs) if pairs else 0.0


def _units(text: str) -> list[str]:
    return [match.group().lower() for match in UNIT.finditer(text)]


def _ngrams(text: str) -> list[tuple[str, ...]]:
    units = _units(text)
    return list(zip(*(units[offset:] for offset in range(NGRAM)), strict=False))


def _located_ngrams(text: str) -> Iterator[tuple[int, int, bool]]:
    """Each 4-gram: where it starts and ends, and whether it occurred before."""
    units = [(match.group().lower(), *match.span()) for match in UNIT.finditer(text)]
    seen = set()
    for window in zip(*(units[offset:] for offset in range(NGRAM)), strict=False):
        gram = tuple(unit for unit, _, _ in window)
        yield window[0][1], window[-1][2], gram in seen
        seen.add(gram)
