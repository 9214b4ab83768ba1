"""Runs of a tiny model without what takes longer than its training."""

from __future__ import annotations

import pytest

from buleyean_rl.evaluation import drift
from buleyean_rl.training import before_after, report


def make_runs_quick(patch: pytest.MonkeyPatch) -> None:
    """Measure drift on short texts, and leave the picture empty."""
    patch.setattr(before_after, "MAX_NEUTRAL_TOKENS", 8)
    patch.setattr(drift, "PASSAGES", 4)
    patch.setattr(drift, "PASSAGE_TOKENS", 8)
    patch.setattr(report, "plot_losses", lambda path, *_: path.touch())
