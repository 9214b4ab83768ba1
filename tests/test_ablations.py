"""The ablated loss against the package's own and by hand, and the study of it on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ablations
import harness
from ablations import Ablation, Parts, ablated_loss, after_others, beginning, each, first_words, in_rounds, whole
from buleyean_rl.data.records import make_record
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import Objective, complement_loss, published_loss
from test_studies import tiny_study  # noqa: F401 - a fixture

COUNTS = Counts(torch.tensor([0, 0, 2]), torch.tensor([1, 4, 3]), torch.tensor([1.0, 2.0, 2.0]), torch.full((3,), 2.0))


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a model and its base, at three nodes over five tokens."""
    torch.manual_seed(0)
    return torch.randn(3, 5), torch.randn(3, 5)


def test_the_packages_own_parts_are_the_packages_losses(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    for parts, known in (
        (Parts(), complement_loss(*logits, COUNTS, Objective())),
        (Parts(uniform=True, contrast="published"), published_loss(logits[0], COUNTS, Objective("published"))),
    ):
        found = ablated_loss(*logits, COUNTS, Objective(), parts)
        for mine, theirs in zip(found[:3], known[:3], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_contrasts_by_hand() -> None:
    """Two tokens of probability 3/4 and 1/4 now, 1/2 each in the base; the first was rejected in its one round."""
    counts = Counts(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1.0]))
    model, base = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    found = {
        name: ablated_loss(model, base, counts, Objective(), Parts(contrast=name)).contrast.item()
        for name in ("unlikelihood", "gated", "published", "none")
    }
    assert found == pytest.approx(
        {"unlikelihood": math.log(4), "gated": math.log(4) / 2, "published": math.log(4 / 3), "none": 0.0}
    )


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
    assert once.total_rounds == 1
    assert once.rejected_spans == record.rejected_spans


def test_the_study(
    tiny_study: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", *tiny_study[1:]])
    changed = [Ablation(""), Ablation("uniform", parts=Parts(uniform=True)), Ablation("whole", records=each(whole))]
    monkeypatch.setitem(ablations.ABLATIONS, "complement", changed)
    ablations.main()
    runs = harness.read_runs(Path(tiny_study[-1]))
    assert set(runs) == {"base"} | {f"complement{label}-lr0.0005-seed42" for label in ("", "-uniform", "-whole")}
    losses = {run["loss_first"] for name, run in runs.items() if name != "base"}
    assert len(losses) == 2  # on answers without spans, `whole` changes nothing
    assert "| complement-uniform-lr0.0005 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ablations.py", "--precision", "bfloat16", *tiny_study[1:]])
    with pytest.raises(SystemExit, match="has runs in float32"):
        ablations.main()
