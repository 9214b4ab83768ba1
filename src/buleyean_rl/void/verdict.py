"""A run's verdict: what it unlearned, and what became of other text."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.system.files import read_json_object
from buleyean_rl.void.store import Row


def read_verdict(folder: Path) -> Row | None:
    """The figures of a finished run that a person can act on; None without any.

    Args:
        folder: of the run.

    Returns:
        `rejected_nll` as [before, after]; `drift`, of each kind of text the `kl` and the `entropy` as [before, after];
        all in nats per token. `stop_reason` says why the guard ended the run, if it did.
    """
    report = read_json_object(folder / "run.json")
    if report is None:  # unfinished
        return None
    try:
        return {
            "rejected_nll": [report["rejected_nll_base"], report["rejected_nll_final"]],
            "drift": {
                kind: {"kl": drift["kl"], "entropy": [drift["entropy_base"], drift["entropy"]]}
                for kind, drift in report["drift"].items()
            },
            "stop_reason": (report.get("guard") or {}).get("stop_reason"),
        }
    except KeyError:  # not of this version
        return None
