"""Kinds of rejection with a rule as judge, and prompts for each: what `tasks.py` tunes on.

loops      4-grams that repeat; the repeats are what is wrong
length     not done within 60 words; wrong is the whole answer, or what follows the 60th word
format     list items or headings where prose was asked; wrong is the whole answer, or its marks
ai_talk    the model speaks of itself as of an AI, where the question was about anything; kept for the last run
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from buleyean_rl.data.records.answers import Spans
from buleyean_rl.evaluation.repetition import is_looping, repeated_spans
from buleyean_rl.inference.protocol import Answer

MAX_WORDS = 60
LIST_MARK = re.compile(r"^[ \t]*(?:[-*+•][ \t]|\d{1,2}[.)][ \t]|#{1,6}[ \t]|\*\*[^*\n]+\*\*:?[ \t]*$)", re.MULTILINE)
AI_TALK = re.compile(
    r"\b(?:as an? (?:AI|artificial|digital|language|chatbot|computer)|"
    r"I(?:'m| am) (?:just |only |merely |simply )?"
    r"an? (?:AI|artificial|language|digital|machine|chatbot|computer|virtual)|"
    r"language model|AI (?:assistant|model|language)|"
    r"I (?:do not|don't|cannot|can't) (?:have|possess|experience|feel|eat|taste)[^.]{0,40}"
    r"(?:feelings|emotions|preferences|opinions|personal|physical|bod(?:y|ies)|experiences|senses))",
    re.IGNORECASE,
)
LISTED = re.compile(
    r"\b(?:how|ways|tips|steps|ideas|reasons|benefits|plan|explain|describe|examples?|what are)\b", re.I
)
PROSE = "{} (prose, please)", "In prose, please: {}"
ASKED = (
    "Did you ever have bad luck with {}?",
    "Can you feel anything when you think of {}?",
    "Have you ever tried {}?",
    "Do you have feelings about {}?",
    "Could you live without {}?",
    "Do you like {}?",
    "Can you remember the last time you saw {}?",
)
TOPICS = (
    *("breakfast", "rain", "jazz", "long walks", "board games", "chocolate", "the sea", "birthdays", "dogs", "trains"),
    *("poetry", "gardening", "horror films", "camping", "coffee", "winter", "dancing", "museums", "football", "soup"),
    *("old houses", "spiders", "flying", "science fiction", "painting", "silence", "family dinners", "chess"),
    *("thunderstorms", "cooking", "mountains", "letters", "cheese", "running", "fashion", "Sunday mornings"),
    *("libraries", "the color green", "karaoke", "puzzles"),
)


class Kind(NamedTuple):
    """A kind of rejection.

    Args:
        is_rejected: the judge.
        spans: the parts of a rejected answer that are wrong; () for the whole.
        prompts: what is asked, from a pool of prompts.
    """

    is_rejected: Callable[[Answer], bool]
    spans: Callable[[str], Spans]
    prompts: Callable[[Sequence[str]], list[str]]


def list_marks(text: str) -> Spans:
    """Where list items and headings begin: their marks."""
    return tuple(match.span() for match in LIST_MARK.finditer(text))


def beyond_the_limit(text: str) -> Spans:
    """What follows the last word that there may be."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    return ((words[MAX_WORDS][0], words[-1][1]),) if len(words) > MAX_WORDS else ()


def is_too_long(answer: Answer) -> bool:
    """Whether an answer was not done within `MAX_WORDS`."""
    return not answer.ended or len(answer.text.split()) > MAX_WORDS


def ask_for_prose(pool: Sequence[str]) -> list[str]:
    """Prompts of the sort that is often answered by a list, and want running text."""
    pool = [prompt.rstrip() for prompt in pool if LISTED.search(prompt)]
    return [wish.format(prompt) for prompt, wish in zip(pool, itertools.cycle(PROSE), strict=False)]


def ask_of_itself(pool: Sequence[str]) -> list[str]:
    """Questions about the model's own taste, as many as there are; of the pool only how many they are counts."""
    return [asked.format(topic) for topic in TOPICS for asked in ASKED][: len(pool)]


def _whole(_text: str) -> Spans:
    return ()


KINDS = {
    "loops": Kind(lambda answer: is_looping(answer.text), lambda text: tuple(repeated_spans(text)), list),
    "length": Kind(is_too_long, _whole, list),
    "length_spans": Kind(is_too_long, beyond_the_limit, list),
    "format": Kind(lambda answer: len(list_marks(answer.text)) > 1, _whole, ask_for_prose),
    "format_spans": Kind(lambda answer: len(list_marks(answer.text)) > 1, list_marks, ask_for_prose),
    "ai_talk": Kind(lambda answer: bool(AI_TALK.search(answer.text)), _whole, ask_of_itself),
}
