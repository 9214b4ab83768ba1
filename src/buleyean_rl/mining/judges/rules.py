"""Judges that are a rule: fast, free and deterministic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.evaluation.repetition import is_looping, repeated_spans
from buleyean_rl.mining.judges.protocol import Verdict
from buleyean_rl.system.wording import counted

Rule = Callable[[str, str], Verdict]

# How a refusal opens, in the words of the common instruct models; looked for in its first sentences only.
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:very |really |so )?(?:sorry|afraid)\b(?=.{0,40}\b(?:but|can(?:'t|not)|unable|not able))"
    r"|\bI(?: simply| just)? (?:can(?:'t|not| not)|won't|will not|am (?:unable|not able) to|(?:must|have to) decline)"
    r"(?: \w+)? (?:help|assist|answer|fulfil|fulfill|provide|comply|do that|discuss|engage|create|write|generate|to)\b"
    r"|\bI'm (?:unable|not able) to\b"
    r"|\bas an? (?:AI|artificial intelligence|large language model|language model)\b"
    r"|\bI (?:do not|don't) feel comfortable\b",
    re.IGNORECASE | re.DOTALL,
)
REFUSAL_CHARACTERS = 200  # from the start, in which a refusal opens
MIN_LETTERS = 20  # to identify a language
MIN_PROBABILITY = 0.95  # of another language, to reject


def loops(_prompt: str, answer: str) -> Verdict:
    """Rejects the repeats of an answer whose 4-grams are repeats to more than 30%."""
    return Verdict(True, tuple(repeated_spans(answer)), "repeats itself") if is_looping(answer) else Verdict(False)


def refusal(_prompt: str, answer: str) -> Verdict:
    """Rejects an answer that opens with a refusal."""
    match = REFUSAL.search(answer[:REFUSAL_CHARACTERS].replace("\u2019", "'"))
    return Verdict(True, (), f"refuses: {match.group()!r}") if match else Verdict(False)


def length(minimum: int, maximum: int | None) -> Rule:
    """Rejects an answer of fewer or more words; of one that is too long, what is beyond the limit.

    Args:
        minimum: words.
        maximum: words; None for no limit.
    """

    def rule(_prompt: str, answer: str) -> Verdict:
        words = list(re.finditer(r"\S+", answer))
        if len(words) < minimum:
            return Verdict(True, (), counted(len(words), "word"))
        if maximum is not None and len(words) > maximum:
            return Verdict(True, ((words[maximum].start(), words[-1].end()),), counted(len(words), "word"))
        return Verdict(False)

    return rule


def pattern(expression: re.Pattern[str]) -> Rule:
    """Rejects every match of an expression."""

    def rule(_prompt: str, answer: str) -> Verdict:
        spans = tuple(match.span() for match in expression.finditer(answer) if match.end() > match.start())
        return Verdict(True, spans, f"matches {answer[slice(*spans[0])]!r}") if spans else Verdict(False)

    return rule


def words(phrases: Iterable[str]) -> Rule:
    """Rejects every occurrence of some words or phrases, in any case, that is no part of a longer word."""
    alternatives = "|".join(
        r"\s+".join(map(re.escape, entry.split())) for entry in sorted(phrases, key=len, reverse=True)
    )
    return pattern(re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE))


def language(code: str) -> Rule:
    """Rejects an answer that is almost certainly in another language; abstains where there is too little text.

    Args:
        code: ISO 639-1, such as `en`.

    Raises:
        UsageError: no such code, or the package that identifies languages is not installed.
    """
    identifier = _load_identifier()
    if code not in identifier.labels:
        raise UsageError(f"no language {code!r}: give one of {', '.join(sorted(identifier.labels))}")

    def rule(_prompt: str, answer: str) -> Verdict:
        if sum(map(str.isalpha, answer)) < MIN_LETTERS:
            return Verdict(None, (), "too short to tell its language")
        label, probability = identifier.classify(answer)
        if label != code and probability >= MIN_PROBABILITY:
            return Verdict(True, (), f"in {label!r}")
        return Verdict(False)

    return rule


@cache
def _load_identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise UsageError("the judge `language` needs py3langid: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
