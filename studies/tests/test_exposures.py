"""The study of exposures: its trees, its counts by hand, and the drift that all readings are held to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import exposures
from exposures import RULES, answer_log, judge, measure, policy_at, readings, trees


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_is_a_distribution_that_a_rule_rejects_in_part(rule: str) -> None:
    tree, _ = next(trees(rule, 1))
    torch.testing.assert_close(tree.base.sum(), torch.ones(()).double())
    assert 0.1 < tree.base[tree.rejected].sum() < 0.9
    again, _ = next(trees(rule, 1))
    assert torch.equal(again.base, tree.base)


def test_counts_are_those_of_the_answers_drawn() -> None:
    tree, generator = next(trees("no pattern", 1))
    state = generator.get_state()
    judged = judge(tree, 5, generator)
    drawn = torch.multinomial(tree.base, 5, replacement=True, generator=generator.set_state(state))
    assert judged.accepted == pytest.approx(1 - tree.rejected[drawn].double().mean().item() or 1)
    for place in range(exposures.PLACES):
        for node in range(exposures.TOKENS**place):
            for token in range(exposures.TOKENS):
                path = (exposures.NODE[place][drawn] == node) & (exposures.ANSWERS[drawn, place] == token)
                assert judged.rounds[place][node, token] == path.sum()
                assert judged.counts[place][node, token] == (path & tree.rejected[drawn]).sum()


def test_every_reading_drifts_as_far_and_gains() -> None:
    tree, generator = next(trees("first token", 1))
    base = answer_log(tree.nodes)
    for reading in readings(judge(tree, 64, generator)).values():
        policy = answer_log(policy_at(tree, reading))
        assert (base.exp() * (base - policy)).sum().item() == pytest.approx(exposures.DRIFT, rel=1e-3)
        assert policy.exp()[~tree.rejected].sum() > base.exp()[~tree.rejected].sum()
    assert set(measure("first token", 8, number=1)) == set(readings(judge(tree, 8, generator)))


def test_it_writes_its_table_and_does_not_measure_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exposures, "measure", lambda *_: {"published": {"accepted_more": 1.5, "entropy_more": 0.25}})
    monkeypatch.setattr(sys, "argv", ["exposures.py", "-o", str(tmp_path)])
    exposures.main()
    assert "| 8 | published | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | +0.25 |" in capsys.readouterr().out
    monkeypatch.setattr(exposures, "measure", None)
    exposures.main()
