"""Forward passes over batches: the frozen reference, alone and together with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from buleyean_rl.batching.batch import Batch, pack, pad_paths
from buleyean_rl.batching.forward import add_references, batch_losses, forward_hidden, reference_hidden
from buleyean_rl.batching.layout import make_batch
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.views import backbone, output_head, plain_model
from buleyean_rl.objectives.losses import Objective
from tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RECORDS = [
    merge_responses([5, 6, number], [([20, 21, 22], [True] * 3), ([20, 30], [True, False])], [9, 2], [9, 9])
    for number in range(40, 48)
]


def adapted(dropout: float = 0.0) -> Any:
    """A model with an adapter that already does something."""
    torch.manual_seed(0)
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, dropout, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_reference_is_the_base_whatever_the_adapter_and_the_mode() -> None:
    base, model = tiny_llama(TOKENIZER), adapted(dropout=0.5)
    model.train()
    got = reference_hidden(model, make_batch(probe_layout(model), RECORDS, Objective()))
    assert not got.requires_grad
    assert model.training
    ids = torch.tensor([RECORDS[0].prompt])
    with torch.no_grad():
        expected = backbone(base)(ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)
        model.eval()
        assert not torch.allclose(backbone(model)(ids, use_cache=False).last_hidden_state[0, -1], expected)


@pytest.mark.parametrize(("layout", "limit"), [(pack, 1), (pack, 100), (pack, 10_000), (pad_paths, 10_000)])
def test_references_computed_together_are_those_of_each_batch(
    layout: Callable[[Sequence[Boundary]], Batch], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    monkeypatch.setattr("buleyean_rl.batching.forward.REFERENCE_TOKENS", limit)
    plain_model(model).set_attn_implementation(PACKED if layout is pack else "sdpa")
    first, computed, last = (layout(records) for records in (RECORDS[:3], RECORDS[5:], RECORDS[3:5]))
    computed = replace(computed, reference=torch.zeros(3))
    completed = add_references(model, [first, computed, last])
    assert completed[1] is computed
    for batch, got in ((first, completed[0]), (last, completed[2])):
        torch.testing.assert_close(got.reference, reference_hidden(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_in_tiles_a_fresh_adapter_is_its_reference_to_the_bit() -> None:
    base = tiny_llama(TOKENIZER, head_dim=32).to(torch.bfloat16)
    model = attach_lora(base, lora_config(4, 8, 0.0, None)).train()
    assert probe_layout(model) == "packed"
    long = [replace(record, prompt=record.prompt * 9) for record in RECORDS]  # short sequences go another way
    for batch in add_references(model, [pack(long[:3]), pack(long[3:])]):  # together
        assert batch.input_ids.numel() >= 64
        assert forward_hidden(backbone(model), batch).equal(batch.reference)


def test_at_the_start_the_kl_of_an_unrejected_node_is_zero() -> None:
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, None))
    batch = make_batch(probe_layout(model), RECORDS, Objective())
    losses = batch_losses(model, output_head(model), batch, Objective())
    anchors = torch.ones(len(batch.nodes), dtype=torch.bool)
    anchors[batch.counts.node] = False
    assert anchors.any()
    torch.testing.assert_close(losses.loss[anchors], torch.zeros(int(anchors.sum())), rtol=0, atol=1e-5)
    assert (losses.loss[~anchors] > 0).all()


ACCEPTED = merge_responses(
    [5, 6, 7], [([20, 21, 22], [True] * 3), ([20, 30], [True] * 2), ([40], [True])], [1, 0, 0], [1, 3, 2]
)


def test_options_never_rejected_leave_the_loss_as_it_is() -> None:
    """At m = 1 what was judged and never rejected has r = 1, as what was never judged."""
    rejected_only = replace(ACCEPTED, judgements=[j for j in ACCEPTED.judgements if j.rejected])
    kept = {(j.node, j.token): j.judged for j in rejected_only.judgements}
    assert kept == {(0, 20): 4, (1, 21): 1, (2, 22): 1}
    assert len(ACCEPTED.judgements) == 5
    model = adapted().double()
    for objective in (Objective(min_p=0.0), Objective(tau=5.93, min_p=0.0), Objective("published")):
        results = []
        for boundary in (ACCEPTED, rejected_only):
            model.zero_grad()
            batch = make_batch(probe_layout(model), [boundary, RECORDS[0]], objective)
            losses = batch_losses(model, output_head(model), batch, objective)
            losses.loss.sum().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results.append([*losses, torch.cat(gradients)])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_an_answer_never_rejected_holds_the_model_at_its_reference() -> None:
    model = adapted()
    alone = merge_responses([5, 6, 7], [([40, 41], [True] * 2)], [0], [2])
    batch = make_batch(probe_layout(model), [alone], Objective())
    losses = batch_losses(model, output_head(model), batch, Objective())
    hidden = forward_hidden(backbone(model), batch), reference_hidden(model, batch)
    log_pi, log_base = (output_head(model)(states).log_softmax(-1) for states in hidden)
    assert len(losses.kl) == 3
    torch.testing.assert_close(losses.kl, (log_base.exp() * (log_base - log_pi)).sum(-1), rtol=1e-4, atol=1e-6)
    assert (losses.loss > 0).all()


def test_only_the_published_objective_leaves_anchors_out() -> None:
    assert len(make_batch("packed", [ACCEPTED], Objective("published")).nodes) == 3
    assert len(make_batch("packed", RECORDS, Objective()).nodes) == sum(record.nodes for record in RECORDS)
    published = make_batch("packed", RECORDS, Objective("published"))
    assert len(published.nodes) == len({(r, node) for r, b in enumerate(RECORDS) for node, *_ in b.judgements})
