"""The thin trainer: every kind of model learns, a step's loss, clipping, checkpoints, the reference's cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from adapted import TOKENIZER, adapted, stir
from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import add_references
from buleyean_rl.batching.layout import ANCHOR_SHARE
from buleyean_rl.data.trie import merge_responses
from buleyean_rl.errors import TrainingError
from buleyean_rl.kernels import matmul
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.views import backbone, output_head
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training.held_out import HeldOut
from buleyean_rl.training.reference_cache import ReferenceCache, entry_format
from buleyean_rl.training.trainer import BuleyeanTrainer
from tiny import tiny_llama, tiny_model
from tiny_trainer import RECORDS, trainer

KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(TOKENIZER),
    "gpt2": lambda: tiny_model("GPT2LMHeadModel", TOKENIZER, n_positions=64),
    "gemma3": lambda: tiny_model("Gemma3ForCausalLM", TOKENIZER, head_dim=16, sliding_window=4),
    "mamba, padded": lambda: tiny_model("MambaForCausalLM", TOKENIZER),
    "lfm2, padded": lambda: tiny_model("Lfm2ForCausalLM", TOKENIZER, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_kind_of_model_learns(make: Callable[[], Any], tmp_path: Path) -> None:
    """From rejections of its own likeliest tokens; measured without dropout, before and after six steps."""
    model = make()
    with torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 40]]), use_cache=False).logits[0, -1].topk(3).indices.tolist()
    records = [merge_responses([5, 6, 40], [([token], [True]) for token in likeliest], [60] * 3, [60] * 3)] * 4
    targets = ["in_proj", "x_proj"] if model.config.model_type == "mamba" else None  # its kernel reads the others
    model = adapted(lambda: model, targets=targets)
    run = trainer(model, tmp_path, records, learning_rate=1e-3, max_steps=6, warmup_steps=0)
    held_out = HeldOut(run.language_model, records, run.args.loss)
    before = held_out.measure()
    run.train()
    after = held_out.measure()
    assert after["loss"] < before["loss"]
    assert after["loss"] >= after["floor"]


# --- steps


def test_accumulated_small_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Also where they hold different numbers of nodes: every rejected answer weighs the same."""
    uneven = [*RECORDS[:3], merge_responses([7], [(list(range(50, 60)), [True] * 10)], [4], [9])]
    results = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = adapted(KINDS["llama"])
        run = trainer(
            model,
            tmp_path,
            uneven,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            warmup_steps=0,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
        )
        run.train()
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        results.append((run.state.log_history[0]["loss"], weights))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_step_is_a_mean_over_rejected_answers_and_one_over_anchors(tmp_path: Path) -> None:
    """One step that holds all of the data; two answers are rejected, two accepted."""
    long = list(range(50, 60))
    records = [
        merge_responses([5, 6, 40], [([20, 21, 22], [True] * 3)], [1], [1]),
        merge_responses([7], [(long, [True] * 10)], [2], [3]),
        merge_responses([8], [([30, 31], [True] * 2)], [0], [1]),
        merge_responses([9], [(long, [True] * 10)], [0], [1]),
    ]
    run = trainer(stir(adapted(KINDS["llama"])), tmp_path, records)
    (batch,) = run.with_references(run.collate(list(enumerate(records)))["batches"])
    losses = run.losses(batch).loss.detach()
    of = {number: losses[batch.record == place].mean() for place, number in enumerate(batch.numbers)}
    assert min(of.values()) > 0
    expected = (of[0] + of[1]) / 2 + ANCHOR_SHARE * (of[2] + of[3]) / 2
    torch.testing.assert_close(run.compute_loss(None, {"batch": batch}).detach(), expected)


def test_the_published_kl_falls_fivefold_in_fifty_steps(tmp_path: Path) -> None:
    """From a base sure of itself to the nearly flat target; its width exceeds the vocabulary, so it can be flat."""
    model = adapted(lambda: tiny_llama(TOKENIZER, hidden_size=512))
    records = [merge_responses([5, 6, n], [(list(range(n, n + 8)), [True] * 8)], [1], [1]) for n in range(40, 60)]
    run = trainer(model, tmp_path, records, objective="published", learning_rate=1e-2, max_steps=50)
    run.train()
    log = [entry for entry in run.state.log_history if "floor" in entry]
    assert len(log) == 50
    assert log[-1]["kl"] < log[0]["kl"] / 5
    assert all(entry["loss"] >= entry["floor"] for entry in log)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = stir(adapted(KINDS["llama"]))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.nan)
    run = trainer(model, tmp_path, max_steps=2)
    with pytest.raises(TrainingError, match="the loss is not a number: lower the learning rate"):
        run.train()


# --- the learning rate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_no_step_has_learning_rate_0(kind: str, steps: int, tmp_path: Path) -> None:
    run = trainer(adapted(KINDS["llama"]), tmp_path, learning_rate=1e-3, max_steps=steps, lr_scheduler_type=kind)
    run.create_optimizer()
    schedule = run.create_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        run.optimizer.step()
        schedule.step()
    assert min(rates) > 1e-6
    assert max(rates) <= 1e-3
    if steps == 1:
        assert rates == [1e-3]
    if kind == "cosine" and steps == 30:  # the warmup takes a share of 0.0888: three steps
        assert rates[:4] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.998e-3], rel=2e-3)


# --- micro-batches and the reference's cache


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("limit", [1, 20, 10_000])
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(limit: int, tmp_path: Path) -> None:
    expected = adapted(KINDS["llama"]).double()  # Adam makes a step of the last digits of a small gradient
    trainer(expected, tmp_path / "a", max_steps=3, learning_rate=1e-3).train()
    model = adapted(KINDS["llama"]).double()
    run = trainer(model, tmp_path / "b", max_steps=3, learning_rate=1e-3, micro_batch_tokens=limit)
    sizes = [len(batch.numbers) for batch in run.collate(list(enumerate(RECORDS[:4])))["batches"]]
    assert sizes == {1: [1] * 4, 20: [2, 2], 10_000: [4]}[limit]
    run.train()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_gradients_are_clipped_as_everybody_clips_them(
    max_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name in ("ours", "theirs"):
        model = adapted(KINDS["llama"])
        run = trainer(model, tmp_path / name, max_steps=2, learning_rate=1e-3, max_grad_norm=max_norm, optim="sgd")
        run.train()
        assert all(parameter.grad is None for parameter in model.parameters())
        runs.append((weights(model), [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]))
        monkeypatch.setattr(BuleyeanTrainer, "_clip_grad_norm", Trainer._clip_grad_norm)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert 1e-2 < min(runs[0][1]) < max(runs[0][1]) < 1e3
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-9)


def test_checkpointed_layers_compute_the_same(tmp_path: Path) -> None:
    outcomes = []
    for checkpointing in (False, True):
        model = adapted(KINDS["llama"], dropout=0.2)
        calls: list[int] = []
        backbone(model).layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        settings = {"max_steps": 3, "learning_rate": 1e-3, "activation_checkpointing": checkpointing}
        trainer(model, tmp_path / str(checkpointing), **settings).train()
        outcomes.append((len(calls), weights(model)))
    (plain_calls, plain), (checkpointed_calls, checkpointed) = outcomes
    assert checkpointed_calls == plain_calls + 3  # once more in each backward pass
    assert plain.equal(checkpointed)


def test_the_reference_is_computed_in_the_first_epoch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []

    def counted(model: Any, batches: list[Batch]) -> list[Batch]:
        computed.extend(batch.numbers for batch in batches if batch.reference is None)
        return add_references(model, batches)

    monkeypatch.setattr("buleyean_rl.training.trainer.add_references", counted)
    outcomes = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        computed.clear()
        model = adapted(KINDS["llama"], dropout=0.2)
        nodes, entry = [record.nodes for record in RECORDS], entry_format(output_head(model), Objective())
        references = ReferenceCache(folder, nodes, entry) if folder else None
        run = trainer(model, tmp_path / "run", num_train_epochs=3, learning_rate=1e-3, references=references)
        run.train()
        outcomes.append((sorted(number for numbers in computed for number in numbers), weights(model)))
    (without, plain), (first, once), (second, again) = outcomes
    assert without == sorted([*range(8)] * 3)
    assert first == [*range(8)]
    assert second == []
    torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-6)
    assert again.equal(once)


@pytest.mark.usefixtures("kernels")
def test_in_tiles_a_run_is_the_same_to_the_bit_however_much_of_the_reference_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmaxes, head_sums = [0], matmul.head_softmax

    def counted(*given: Any) -> Any:
        softmaxes[-1] += 1
        return head_sums(*given)

    monkeypatch.setattr(matmul, "head_softmax", counted)
    outcomes = []
    for with_softmax in (False, True, True):
        softmaxes.append(0)
        torch.manual_seed(0)
        base = tiny_llama(TOKENIZER, head_dim=32, vocab_size=416).bfloat16()
        model = attach_lora(base, lora_config(4, 8, 0.0, None))
        nodes, entry = [record.nodes for record in RECORDS], entry_format(output_head(model), Objective(min_p=0.0))
        assert entry.with_softmax
        references = ReferenceCache(tmp_path / str(with_softmax), nodes, entry._replace(with_softmax=with_softmax))
        settings: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 1e-3, "min_p": 0.0}
        trainer(model, tmp_path / "run", references=references, **settings).train()
        outcomes.append(weights(model))
    # two steps an epoch, in each the model's and, if it is not cached, the reference's
    assert softmaxes[1:] == [8, 6, 4]
    assert outcomes[0].equal(outcomes[1])
    assert outcomes[0].equal(outcomes[2])
