"""A run's verdict: what it unlearned, and what became of other text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buleyean_rl.system.files import read_json_object
from buleyean_rl.void.store import Row


def read_verdict(folder: Path) -> Row | None:
    """The figures of a finished run that a person can act on; None without any.

    Args:
        folder: of the run.

    Returns:
        `rejected_nll` and `entropy` as [before, after] and `kl`, all in nats per token: the latter two, of neutral
        text, are the drift. `stop_reason` says why the guard ended the run, if it did.
    """
    report = read_json_object(folder / "run.json")
    if report is None:  # unfinished
        return None
    try:
        guard = report.get("guard") or {}
        base, last = guard.get("base") or {}, _sound_check(guard)
        return {
            "rejected_nll": [report["rejected_nll_base"], report["rejected_nll_final"]],
            "kl": last.get("kl"),
            "entropy": [base.get("entropy"), last.get("entropy")],
            "stop_reason": guard.get("stop_reason"),
        }
    except KeyError:  # not of this version
        return None


def _sound_check(guard: Row) -> dict[str, Any]:
    """The guard's check of the adapter that the run ended with."""
    checks = guard.get("checks") or []
    if guard.get("stop_reason"):
        checks = [check for check in checks if check["step"] == guard.get("restored_step")]
    return checks[-1] if checks else {}
