"""Verdicts to records."""

from __future__ import annotations

import pytest
from rich.console import Console

from buleyean_rl.mining.votes import judge_loops

QUIET = Console(quiet=True)


def test_only_loops_are_rejected_and_only_where_they_repeat() -> None:
    loop = "Sleep well! Go to bed early. Go to bed early. Go to bed early."
    accepted, record = judge_loops(["p", "q"], ["A fine answer.", loop])
    assert (accepted.prompt, accepted.rejection_counts, accepted.rounds) == ("p", (0,), (1,))
    assert (record.prompt, record.rejected_responses) == ("q", (loop,))
    assert (record.rejection_counts, record.rounds) == ((1,), (1,))
    ((span,),) = record.rejected_spans
    assert loop[slice(*span)] == "Go to bed early. Go to bed early."
    assert span[0] > loop.index("Go to bed early.")
    with pytest.raises(ValueError, match="shorter"):
        judge_loops(["p", "q"], ["a"])
