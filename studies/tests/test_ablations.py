"""The ablated losses against the package's own and by hand, and the study of them on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ablations
import own_loops
from ablations import (
    Ablation,
    after_others,
    beginning,
    each,
    first_words,
    in_rounds,
    published_contrast_loss,
    uniform_base_loss,
    whole,
)
from buleyean_rl.data.records import make_record
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import Objective, published_loss
from harness import Summary

COUNTS = Counts(
    torch.tensor([0, 0, 2]), torch.tensor([1, 4, 3]), torch.tensor([1.0, 2.0, 2.0]), torch.full((3,), 2.0), 3
)


def test_on_a_uniform_base_the_published_contrast_makes_the_published_loss() -> None:
    torch.manual_seed(0)
    logits, base = torch.randn(3, 5), torch.randn(3, 5)
    published = published_loss(logits, COUNTS, Objective("published"))
    losses = published_contrast_loss(logits, torch.zeros_like(base), COUNTS, Objective())
    torch.testing.assert_close((losses.kl, losses.contrast), (published.kl, published.contrast))
    torch.testing.assert_close(uniform_base_loss(logits, base, COUNTS, Objective()).kl, published.kl)


def test_published_contrast_by_hand() -> None:
    """Tokens of probability 3/4 and 1/4 now, 1/2 each in the base; the first was rejected in its one round: P = 1/3."""
    counts = Counts(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1.0]), 1)
    model, base = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    losses = published_contrast_loss(model, base, counts, Objective(alpha=0.5))
    kl = math.log(4 / 9) / 3 + 2 * math.log(8 / 3) / 3
    assert losses.contrast.item() == pytest.approx(math.log(4 / 3))
    assert losses.kl.item() == pytest.approx(kl)
    assert losses.loss.item() == pytest.approx((kl + math.log(4 / 3)) / 2)


def test_views_of_a_record() -> None:
    record = make_record("Tip?", ["Sleep. Sleep.", "No."], [60, 0], 60, [[(7, 13)], []])
    assert whole(record).rejected_spans == ((), ())
    long = make_record("Tip?", ["Sleep. " * 50], [60], 60, [[(7, 20), (21, 300), (310, 350)]])
    assert beginning(100, long).rejected_responses == (("Sleep. " * 50)[:107],)
    assert beginning(100, long).rejected_spans == (((7, 20), (21, 107)),)
    assert first_words(long).rejected_spans == (((7, 13), (21, 27), (310, 314)),)
    assert [(r.prompt, r.rejected_responses) for r in after_others([record, replace(long, prompt="Why?")])] == [
        ("Tip?", record.rejected_responses),
        ("Why?", long.rejected_responses),
        ("Why?", record.rejected_responses),
        ("Tip?", long.rejected_responses),
    ]
    once = in_rounds(1, record)
    assert once.rejection_counts == (1, 0)
    assert once.rounds == (1, 1)
    assert once.rejected_spans == record.rejected_spans


def test_the_study(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", *tiny_study[1:]])
    changed = [Ablation(), Ablation("uniform", loss=uniform_base_loss), Ablation("whole", records=each(whole))]
    monkeypatch.setattr(ablations, "ABLATIONS", changed)
    ablations.main()
    runs = Summary(Path(tiny_study[-1])).runs
    assert set(runs) == {f"complement-alpha0.9{label}-lr0.0005-seed42" for label in ("", "-uniform", "-whole")}
    losses = {run["loss_first"] for run in runs.values()}
    assert len(losses) == 2  # on answers without spans, `whole` changes nothing
    assert "| complement-alpha0.9-uniform-lr0.0005 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ablations.py", "--precision", "bfloat16", *tiny_study[1:]])
    with pytest.raises(SystemExit, match="has runs in float32"):
        ablations.main()


def test_every_ablation_has_a_run_of_its_own() -> None:
    assert len({ablation.method.run for ablation in ablations.ABLATIONS}) == len(ablations.ABLATIONS)
    assert ablations.REFERENCE == own_loops.REFERENCE
