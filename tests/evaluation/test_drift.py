"""Drift: of a run the plain KL and entropies on its base's own passages, of a base none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from buleyean_rl.evaluation import drift as measuring
from buleyean_rl.evaluation.drift import Drift, as_drifts, as_json, find_moved_text, largest_kl, measure_drift
from buleyean_rl.inference.own_text import own_passages
from buleyean_rl.models.model import open_model
from buleyean_rl.models.source import resolve
from tiny import tiny_run

STILL = Drift(0.0, 2.0, 2.0, 3.0, 3.0)


@pytest.fixture
def _few_passages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_cache: Callable[[Path], None]) -> None:
    monkeypatch.setattr(measuring, "PASSAGES", 2)
    monkeypatch.setattr(measuring, "PASSAGE_TOKENS", 10)
    use_cache(tmp_path / "cache")


@pytest.mark.usefixtures("_few_passages")
def test_the_drift_of_a_run_is_that_of_full_distributions(base: Path, tmp_path: Path) -> None:
    source = resolve(str(base)).with_adapter(tiny_run(tmp_path / "run", base))
    run = open_model(source, dtype=torch.float32, keep_adapter=True)
    kl, entropies, nlls = [], ([], []), ([], [])
    measured = measure_drift(run)
    for ids in own_passages(run, 2, 10):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            with run.adapter_disabled():
                before = run.module(tokens).logits[0, :-1].log_softmax(-1)
            after = run.module(tokens).logits[0, :-1].log_softmax(-1)
        kl.append((before.exp() * (before - after)).sum(-1))
        for place, log_p in enumerate((before, after)):
            entropies[place].append(-(log_p.exp() * log_p).sum(-1))
            nlls[place].append(-log_p.gather(1, tokens[0, 1:, None]).squeeze(1))
    expected = [torch.cat(parts).mean().item() for parts in (kl, *entropies, *nlls)]
    assert list(measured["own"]) == pytest.approx(expected, rel=1e-3)
    assert measured["own"].kl > 0
    assert set(measured) == {"own", "bundled"}
    assert as_drifts(as_json(measured)) == measured


@pytest.mark.usefixtures("_few_passages")
def test_a_base_has_not_moved(base: Path) -> None:
    for drift in measure_drift(open_model(str(base))).values():
        assert drift.kl == 0
        assert drift.entropy == drift.entropy_base > 0
        assert drift.nll == drift.nll_base > 0


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        (STILL, None),
        (STILL._replace(kl=0.05, entropy=2.19), None),
        (STILL._replace(kl=0.051), "bundled texts moved by KL 0.051 nats per token, more than 0.05"),
        (
            STILL._replace(entropy=1.79),
            "the entropy of bundled texts went from 2.00 to 1.79 nats per token, by more than",
        ),
        (STILL._replace(nll=float("nan")), "bundled texts are not numbers"),
    ],
)
def test_which_text_has_moved(moved: Drift, words: str | None) -> None:
    drifts = {"own": STILL, "bundled": moved}
    reason = find_moved_text(drifts, 0.05, 0.1)
    assert reason is None if words is None else reason is not None and words in reason
    assert largest_kl(drifts) == moved.kl
