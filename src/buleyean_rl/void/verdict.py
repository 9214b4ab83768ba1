"""A run's verdict: what it unlearned, and what became of other text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import Spans
from buleyean_rl.system.files import read_json_object
from buleyean_rl.void.store import Row

COMPARED = 200  # characters of a rejected text: who says them says it again
LEARNT_NATS = 0.05  # by which rejected answers become less likely, at least
UNCHANGED, SLIGHTLY = 0.02, 0.05  # KL of other text from the base at most, nats per token: the latter is the guard's


def is_unlearned(answer: str, spans: Spans, after: str) -> bool:
    """Whether a later answer says nothing of what was rejected.

    Args:
        answer: that was rejected.
        spans: its rejected parts; none for all of it.
        after: what the trained model says.
    """
    parts = [answer[start:end] for start, end in spans] or [answer]
    return not any(_squeeze(part)[:COMPARED] in _squeeze(after) for part in parts if part.strip())


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


def _squeeze(text: str) -> str:
    """A text with every run of white space as one space."""
    return " ".join(text.split())
