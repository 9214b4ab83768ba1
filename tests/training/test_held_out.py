"""The objective on held-out records, against the dense one."""

from __future__ import annotations

import pytest
import torch

from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.batching.layout import make_batch
from buleyean_rl.data.trie import merge_responses
from buleyean_rl.evaluation.neutral_text import mean_nll
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model
from buleyean_rl.objectives.losses import Objective, complement_loss, published_loss
from buleyean_rl.training.held_out import HeldOut
from tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("name", ["complement", "published"])
def test_mean_losses_are_the_dense_ones_without_dropout(name: str) -> None:
    objective = Objective(name)  # type: ignore[arg-type]
    boundaries = [
        merge_responses([5, 6, 7], [([20, 21], [True, True]), ([25, 30, 31], [True] * 3)], [3, 1], [4, 4]),
        merge_responses([9], [([21, 22, 23, 24], [False, False, True, True])], [2], [2]),
        merge_responses([9, 8], [([50], [True])], [1], [2]),
    ]
    torch.manual_seed(0)
    model = Model.from_module(tiny_llama(tiny_tokenizer()))
    model.attach_adapter(lora_config(4, 8, 0.5, None))
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.module.train()
    held_out = HeldOut(model, boundaries, objective)
    got = held_out.measure()
    assert got == held_out.measure()
    assert got.pop("rejected_nll") == pytest.approx(mean_nll(model, boundaries))
    assert model.module.training

    batch = make_batch(model.layout, boundaries, objective)
    with torch.no_grad(), model.eval_mode():
        logits = model.head(forward_hidden(model.backbone, batch))
        with model.adapter_disabled():
            reference = model.head(forward_hidden(model.backbone, batch))
    expected = (
        complement_loss(logits, reference, batch.counts, objective)
        if objective.uses_reference
        else published_loss(logits, batch.counts, objective)
    )
    assert got == pytest.approx({part: value.mean().item() for part, value in expected._asdict().items()}, rel=1e-4)
