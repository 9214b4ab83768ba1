"""Take personal data out of records: e-mail addresses, phone numbers, keys and passwords.

Patterns match what looks like such data, and no names: the user has to look at the result. Each match becomes its kind
in brackets, and spans move with the text.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate

from buleyean_rl.data.records import RejectionRecord, Spans, make_record

# No pattern may begin within what it failed on before: its time would be quadratic in a hostile text.
_KEYS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    r"\b(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9_-]{16,}",
    r"\b(?:ghp|gho|ghu|ghs|ghr|hf|glpat|npm|pypi|github_pat)[-_][A-Za-z0-9_-]{16,}",
    r"\bxox[abposr]-[A-Za-z0-9-]{10,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bAIza[A-Za-z0-9_-]{30,}",
    r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    r"(?<=\bBearer )[A-Za-z0-9._~+/-]{16,}=*",
    # after a word such as `password`: only the value goes
    r"(?i:\b(?:api[ _-]?key|access[ _-]?token|token|secret|passwor[dt]|passwd|pwd)\b[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?)"
    r"(?P<value>(?=[^\s\"',;]*[\d\W_])[^\s\"',;]{6,})",
)
_PHONES = (
    r"(?<![\w+])\+\d[\d ().\-/]{6,20}\d(?!\w)",
    r"(?<![\w.+-])\(?\d{2,5}\)?(?:[ .\-/]\(?\d{2,5}\)?){2,5}(?![\w])(?![.:]\d)",
    r"(?<![\w.+-])\(\d{2,5}\) ?\d{3,5}(?:[ .\-]?\d{2,5})?(?!\w)",
    r"(?i:\b(?:phone|tel|telephone|mobile|cell|call|text|whatsapp|fax|number)\b\D{0,15})(?P<value>\d{7,15})(?!\w)",
)
_PATTERNS = (
    ("key", tuple(re.compile(pattern, re.DOTALL) for pattern in _KEYS)),
    ("email", (re.compile(r"(?<![\w.+%'-])[\w.+%'-]+@[\w-]+(?:\.[\w-]+)+"),)),
    ("phone", tuple(re.compile(pattern) for pattern in _PHONES)),
)
PHONE_DIGITS = range(9, 16)  # dates and times have fewer, account numbers more
KINDS = tuple(kind for kind, _ in _PATTERNS)


def redact_record(record: RejectionRecord, counts: Counter[str]) -> RejectionRecord:
    """A record without the personal data that patterns match, in its messages and answers.

    Args:
        record: any.
        counts: is increased by the matches of each kind.

    Returns:
        The record; the same one if nothing matched. A span over part of a match covers its replacement.
    """
    before = counts.total()
    if isinstance(record.prompt, str):
        prompt: object = redact_text(record.prompt, counts)[0]
    else:
        prompt = [{"role": role, "content": redact_text(content, counts)[0]} for role, content in record.prompt]
    answers, spans = [], []
    for text, ranges in zip(record.rejected_responses, record.rejected_spans, strict=True):
        redacted, moved = redact_text(text, counts, ranges)
        answers.append(redacted)
        spans.append(moved)
    if counts.total() == before:
        return record
    return make_record(
        prompt,
        answers,
        record.rejection_counts,
        spans=spans,
        rounds=record.rounds,
        ended=record.ended,
        policy=record.policy,
    )


def redact_text(text: str, counts: Counter[str], spans: Spans = ()) -> tuple[str, Spans]:
    """A text without personal data, and spans of it moved along.

    Args:
        text: any.
        counts: is increased by the matches of each kind.
        spans: [start, end) ranges of the text.
    """
    pieces, replacements, position = [], [], 0
    for start, end, kind in _find_matches(text):
        counts[kind] += 1
        pieces += [text[position:start], f"[{kind}]"]
        replacements.append((start, end, len(kind) + 2))
        position = end
    redacted = "".join([*pieces, text[position:]])
    return redacted, _shift_spans(spans, replacements)


def _shift_spans(spans: Spans, replacements: list[tuple[int, int, int]]) -> Spans:
    """Spans after replacements (start, end, new length): an edge within one moves to that one's edge."""
    ends = [end for _, end, _ in replacements]
    shifts = [0, *accumulate(length - (end - start) for start, end, length in replacements)]

    def shift(position: int, inner: Callable[[int, int], int]) -> int:
        k = bisect_right(ends, position)
        within = k < len(replacements) and replacements[k][0] < position
        return shifts[k] + (inner(replacements[k][0], replacements[k][2]) if within else position)

    return tuple(
        (shift(start, lambda first, _: first), shift(end, lambda first, length: first + length)) for start, end in spans
    )


def _find_matches(text: str) -> Iterator[tuple[int, int, str]]:
    """Disjoint (start, end, kind), in order; of those that overlap the first kind's wins."""
    matches: list[tuple[int, int, str]] = []
    covered = bytearray(len(text))
    for kind, patterns in _PATTERNS:
        for pattern in patterns:
            for match in pattern.finditer(text):
                start, end = match.span("value") if "value" in pattern.groupindex else match.span()
                if kind == "phone" and not _is_phone(match.group(), start == match.start()):
                    continue
                if covered.find(1, start, end) < 0:
                    covered[start:end] = b"\1" * (end - start)
                    matches.append((start, end, kind))
    return iter(sorted(matches))


def _is_phone(text: str, bare: bool) -> bool:
    """Whether digits that stand for themselves are as many as a phone number's, and no address of a machine."""
    if not bare:
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return sum(map(str.isdigit, text)) in PHONE_DIGITS
    return False
