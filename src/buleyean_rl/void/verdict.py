"""A run's verdict: what it unlearned, and what became of other text."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import Spans
from buleyean_rl.evaluation.repetition import NGRAM, UNIT
from buleyean_rl.inference.protocol import Answer
from buleyean_rl.system.files import read_json_object
from buleyean_rl.void.store import Row
from buleyean_rl.void.store.rejections import RejectedAnswer

SAID_AGAIN = 1 / 3  # share of what was rejected: who says so much of it says it again
LEARNT_NATS = 0.05  # by which rejected answers become less likely, at least
UNCHANGED, SLIGHTLY = 0.02, 0.05  # KL of other text from the base at most, nats per token: the latter is the guard's


def is_unlearned(rejected: Sequence[RejectedAnswer], after: Answer, before: Answer | None) -> bool | None:
    """Whether a model says nothing any more of what was rejected.

    Args:
        rejected: the rejected answers to a prompt.
        after: what the model answers now, at least as long as they are if it did not end by itself.
        before: what the base model answers; None where the rejected answers are known to have been given here.

    Returns:
        None where nobody knows: the base does not say it either, or the answer was cut before it.
    """
    if any(_says_again(each, after) for each in rejected):
        return False
    if not any(_is_reached(each, after) for each in rejected):
        return None
    return True if before is None or any(_says_again(each, before) for each in rejected) else None


def returned_share(answer: str, spans: Spans, after: str) -> float:
    """Share of what was rejected, between 0 and 1, that a later answer says again where it said it.

    The two are aligned word by word. A run of four words counts, or of as many as were rejected: common words do not,
    and what was said once before it was repeated is no repeat.

    Args:
        answer: that was rejected.
        spans: its rejected parts; none for all of it.
        after: a later answer.
    """
    units = [(match.group().lower(), *match.span()) for match in UNIT.finditer(answer)]
    is_rejected = [not spans or any(start < last and first < end for first, last in spans) for _, start, end in units]
    words = [match.group().lower() for match in UNIT.finditer(after)]
    if not any(is_rejected):  # white space; or nothing at all was said, and is said again
        return float(not spans and not words)
    run = min(NGRAM, sum(is_rejected))
    blocks = SequenceMatcher(None, [unit for unit, _, _ in units], words, autojunk=False).get_matching_blocks()
    returned = sum(sum(is_rejected[block.a : block.a + block.size]) for block in blocks if block.size >= run)
    return returned / sum(is_rejected)


def _says_again(rejected: RejectedAnswer, later: Answer) -> bool:
    text, spans = rejected.text, rejected.spans
    if not later.ended:  # compared over the same length
        text = text[: len(later.text)]
    return _is_reached(rejected, later) and returned_share(text, spans, later.text) >= SAID_AGAIN


def _is_reached(rejected: RejectedAnswer, later: Answer) -> bool:
    """Whether an answer is long enough to come to what was rejected."""
    return later.ended or not rejected.spans or any(start < len(later.text) for start, _ in rejected.spans)


def read_verdict(folder: Path, samples: Sequence[Row]) -> Row | None:
    """The verdict of a finished run; None without any.

    Args:
        folder: of the run.
        samples: of the run, see `store.runs.Sample`.

    Returns:
        `outcome` (good, partly, nothing, or guard where the guard ended the run); how many of the rejected prompts that
        were `asked` again are `unlearned`; `other_text` (unchanged, slightly, changed); and `details`: `rejected_nll`
        as [before, after], `drift`, of each kind of text the `kl` and the `entropy` as [before, after], all in nats per
        token, and why the guard ended the run, if it did.
    """
    report = read_json_object(folder / "run.json")
    if report is None:  # unfinished
        return None
    try:
        details = _details(report)
    except KeyError:  # not of this version
        return None
    judged = [sample["unlearned"] for sample in samples if sample["unlearned"] is not None]
    before, after = details["rejected_nll"]
    drift = max((each["kl"] for each in details["drift"].values()), default=0.0)
    return {
        "outcome": _outcome(details["stop_reason"], after - before, sum(judged), len(judged)),
        "unlearned": sum(judged),
        "asked": len(judged),
        "other_text": "unchanged" if drift <= UNCHANGED else "slightly" if drift <= SLIGHTLY else "changed",
        "details": details,
    }


def _outcome(stop_reason: str | None, nats: float, unlearned: int, asked: int) -> str:
    if stop_reason:
        return "guard"
    if (asked and not unlearned) or (not asked and nats < LEARNT_NATS):
        return "nothing"
    return "good" if unlearned == asked else "partly"


def _details(report: dict[str, Any]) -> Row:
    return {
        "rejected_nll": [report["rejected_nll_base"], report["rejected_nll_final"]],
        "drift": {
            kind: {"kl": drift["kl"], "entropy": [drift["entropy_base"], drift["entropy"]]}
            for kind, drift in report["drift"].items()
        },
        "stop_reason": (report.get("guard") or {}).get("stop_reason"),
    }
