"""The thin trainer: which layout a model gets, the reference, a step's loss, checkpoints, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer

from buleyean_rl.batching.batch import Batch, pack, pad_paths
from buleyean_rl.batching.forward import add_references, batch_losses, forward_hidden, reference_hidden
from buleyean_rl.batching.layout import Layout, choose_layout, make_batch, probe
from buleyean_rl.batching.rows import bin_pack
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.errors import TrainingError
from buleyean_rl.kernels import matmul
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_decoder import _Pass
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.views import backbone, output_head, plain_model
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training.checkpoints import discard_checkpoints, last_checkpoint
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.held_out import HeldOut
from buleyean_rl.training.reference_cache import ReferenceCache, entry_format
from buleyean_rl.training.trainer import BuleyeanTrainer
from tiny import tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GEMMA = {"head_dim": 16, "sliding_window": 4}

PACKS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(TOKENIZER),
    "qwen2": lambda: tiny_qwen2(TOKENIZER),
    "mistral that forgets": lambda: tiny_mistral(TOKENIZER, sliding_window=4),
    "gpt2": lambda: tiny_model("GPT2LMHeadModel", TOKENIZER, n_positions=64),
    "gemma3": lambda: tiny_model("Gemma3ForCausalLM", TOKENIZER, **GEMMA),
}
PADS: dict[str, Callable[[], Any]] = {
    "mamba, which has no attention": lambda: tiny_model("MambaForCausalLM", TOKENIZER),
    "bloom, whose attention is its own": lambda: tiny_model("BloomForCausalLM", TOKENIZER, n_head=4),
    "lfm2, half convolutions": lambda: tiny_model("Lfm2ForCausalLM", TOKENIZER, layer_types=["conv", "full_attention"]),
    "gemma2, whose scores are capped": lambda: tiny_model(
        "Gemma2ForCausalLM", TOKENIZER, **GEMMA, attn_logit_softcapping=1.0
    ),
}
RECORDS = [
    merge_responses([5, 6, number], [([20, 21, 22], [True] * 3), ([20, 30], [True, False])], [9, 2], 9)
    for number in range(40, 48)
]


def trainer(
    model: Any,
    folder: Path,
    records: list[Boundary] = RECORDS,
    references: ReferenceCache | None = None,
    **settings: Any,
) -> BuleyeanTrainer:
    defaults: dict[str, Any] = {"output_dir": str(folder), "save_strategy": "no", "lora_dropout": 0.0}
    config = BuleyeanConfig(**(defaults | settings))
    return BuleyeanTrainer(model, config, records, references=references)


def adapted(make: Callable[[], Any], dropout: float = 0.0, targets: list[str] | None = None) -> Any:
    torch.manual_seed(0)
    return attach_lora(make(), lora_config(4, 8, dropout, targets))


def stir(model: Any) -> Any:
    """Give the adapter something to say."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


# --- layouts


@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS.keys())
def test_a_model_with_replaceable_attention_is_packed(make: Callable[[], Any]) -> None:
    assert choose_layout(make()) is pack


@pytest.mark.parametrize("make", PADS.values(), ids=PADS.keys())
def test_any_other_model_is_padded_and_keeps_its_attention(make: Callable[[], Any]) -> None:
    model = make()
    own = model.config._attn_implementation
    assert choose_layout(model) is pad_paths
    assert model.config._attn_implementation == own


def test_capped_scores_are_never_packed_without_their_cap() -> None:
    model = tiny_model("Gemma2ForCausalLM", TOKENIZER, **GEMMA, query_pre_attn_scalar=1)
    assert choose_layout(model) is pad_paths


@pytest.mark.parametrize("make", [*PACKS.values(), *PADS.values()], ids=[*PACKS, *PADS])
def test_every_kind_of_model_learns(make: Callable[[], Any], tmp_path: Path) -> None:
    """From rejections of its own likeliest tokens; measured without dropout, before and after six steps."""
    model = make()
    with torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 40]]), use_cache=False).logits[0, -1].topk(3).indices.tolist()
    records = [merge_responses([5, 6, 40], [([token], [True]) for token in likeliest], [60] * 3, 60)] * 4
    targets = ["in_proj", "x_proj"] if model.config.model_type == "mamba" else None  # its kernel reads the others
    model = adapted(lambda: model, targets=targets)
    run = trainer(model, tmp_path, records, learning_rate=1e-3, max_steps=6, warmup_steps=0)
    held_out = HeldOut(model, records, run.args.loss)
    before = held_out.measure()
    run.train()
    after = held_out.measure()
    assert after["loss"] < before["loss"]
    assert after["loss"] >= after["floor"]


# --- the reference


def test_the_reference_is_the_base_whatever_the_adapter_and_the_mode() -> None:
    base, model = tiny_llama(TOKENIZER), stir(adapted(PACKS["llama"], dropout=0.5))
    model.train()
    batch = make_batch(choose_layout(model), RECORDS, Objective())
    got = reference_hidden(model, batch)
    assert not got.requires_grad
    assert model.training
    ids = torch.tensor([RECORDS[0].prompt])
    with torch.no_grad():
        expected = backbone(base)(ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)
        model.eval()
        assert not torch.allclose(backbone(model)(ids, use_cache=False).last_hidden_state[0, -1], expected)


@pytest.mark.parametrize("layout", [pack, pad_paths])
@pytest.mark.parametrize("room", [1, 100, 10_000])
def test_references_computed_together_are_those_of_each_row(
    layout: Layout, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stir(adapted(PACKS["llama"]))
    monkeypatch.setattr("buleyean_rl.batching.forward.REFERENCE_TOKENS", room)
    plain_model(model).set_attn_implementation(PACKED if layout is pack else "sdpa")
    rows = [layout(records) for records in (RECORDS[:3], probe(len(TOKENIZER)), RECORDS[3:5])]
    known = replace(rows[1], reference=torch.zeros(3))
    for row, batch in zip(rows, add_references(model, [*rows[:1], known, *rows[2:]]), strict=True):
        if row is rows[1]:
            assert batch is known
        else:
            torch.testing.assert_close(batch.reference, reference_hidden(model, row), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiles")
def test_in_tiles_a_fresh_adapter_is_its_reference_to_the_bit() -> None:
    base = tiny_llama(TOKENIZER, head_dim=32).to(torch.bfloat16)
    model = attach_lora(base, lora_config(4, 8, 0.0, None)).train()
    layout = choose_layout(model)
    long = [replace(record, prompt=record.prompt * 9) for record in RECORDS]  # short rows go another way
    rows = [layout(long[:3]), layout(long[3:])]
    for batch in add_references(model, rows):  # in one row
        assert batch.input_ids.numel() >= 64
        assert forward_hidden(backbone(model), batch).equal(batch.reference)


def test_at_the_start_the_kl_of_an_unrejected_node_is_zero() -> None:
    model = adapted(PACKS["llama"])
    batch = make_batch(choose_layout(model), RECORDS, Objective())
    losses = batch_losses(model, output_head(model), batch, Objective())
    anchors = torch.ones(len(batch.nodes), dtype=torch.bool)
    anchors[batch.counts.node] = False
    assert anchors.any()
    torch.testing.assert_close(losses.loss[anchors], torch.zeros(int(anchors.sum())), rtol=0, atol=1e-5)
    assert (losses.loss[~anchors] > 0).all()


def test_only_the_published_objective_leaves_anchors_out() -> None:
    assert len(make_batch(pack, RECORDS, Objective()).nodes) == sum(record.nodes for record in RECORDS)
    published = make_batch(pack, RECORDS, Objective("published"))
    assert len(published.nodes) == len({(r, node) for r, b in enumerate(RECORDS) for node, _, _ in b.rejections})


# --- steps


def test_accumulated_small_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Also where they hold different numbers of nodes: every node weighs the same."""
    uneven = [*RECORDS[:3], merge_responses([7], [(list(range(50, 60)), [True] * 10)], [4], 9)]
    results = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = adapted(PACKS["llama"])
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


def test_the_published_kl_falls_fivefold_in_fifty_steps(tmp_path: Path) -> None:
    """From a base sure of itself to the nearly flat target; its width exceeds the vocabulary, so it can be flat."""
    model = adapted(lambda: tiny_llama(TOKENIZER, hidden_size=512))
    records = [merge_responses([5, 6, n], [(list(range(n, n + 8)), [True] * 8)], [1], 1) for n in range(40, 60)]
    run = trainer(model, tmp_path, records, objective="published", learning_rate=1e-2, max_steps=50)
    run.train()
    log = [entry for entry in run.state.log_history if "floor" in entry]
    assert len(log) == 50
    assert log[-1]["kl"] < log[0]["kl"] / 5
    assert all(entry["loss"] >= entry["floor"] for entry in log)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = stir(adapted(PACKS["llama"]))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.nan)
    run = trainer(model, tmp_path, max_steps=2)
    with pytest.raises(TrainingError, match="the loss is not a number: lower the learning rate"):
        run.train()


# --- checkpoints


def checkpoint(folder: Path, step: int, state: str | None) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 8):
        checkpoint(tmp_path, step, json.dumps({"global_step": step}))
    checkpoint(tmp_path, 11, '{"global_')  # killed while it was written
    checkpoint(tmp_path, 12, "{}")
    checkpoint(tmp_path, 13, None)
    (tmp_path / "checkpoint-14").write_text("a file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_only_checkpoints_are_discarded(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, None)
    (tmp_path / "run.json").write_text("{}")
    discard_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# --- rows and the reference's cache


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("sizes", "limit", "rows"),
    [
        ([512] * 4, 1536, [[512, 512], [512, 512]]),  # not three and one
        ([900, 300, 200], 1000, [[900], [300, 200]]),
        ([60, 50, 40, 30, 20], 100, [[60, 40], [50, 30, 20]]),
        ([150, 60, 30], 100, [[150], [60, 30]]),  # one with more than a row
        ([6, 5, 5, 4, 4, 4, 4], 16, [[6, 5, 5], [4, 4, 4, 4]]),  # the shortest row has no room for the last
        ([7, 6, 5, 5, 4, 4, 4, 3], 19, [[7, 4], [6, 4, 4], [5, 5, 3]]),
        ([], 10, []),
    ],
    ids=str,
)
def test_rows_are_few_and_then_even(sizes: list[int], limit: int, rows: list[list[int]]) -> None:
    assert sorted(bin_pack(sizes, int, limit)) == sorted(rows)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 50))
def test_rows_hold_everything_once_and_no_more_than_they_may(sizes: list[int], limit: int) -> None:
    rows = bin_pack(list(enumerate(sizes)), lambda item: item[1], limit)
    assert sorted(item for row in rows for item in row) == list(enumerate(sizes))
    assert all(rows)
    assert all(sum(size for _, size in row) <= max([limit, *sizes]) for row in rows)


@pytest.mark.parametrize("most", [1, 20, 10_000])
def test_how_a_step_is_cut_into_rows_does_not_matter(most: int, tmp_path: Path) -> None:
    expected = adapted(PACKS["llama"]).double()  # Adam makes a step of the last digits of a small gradient
    trainer(expected, tmp_path / "a", max_steps=3, learning_rate=1e-3).train()
    model = adapted(PACKS["llama"]).double()
    run = trainer(model, tmp_path / "b", max_steps=3, learning_rate=1e-3, micro_batch_tokens=most)
    rows = [len(batch.numbers) for batch in run.collate(list(enumerate(RECORDS[:4])))["batches"]]
    assert rows == {1: [1] * 4, 20: [2, 2], 10_000: [4]}[most]
    run.train()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("most", [1e-2, 1e3])
def test_gradients_are_clipped_as_everybody_clips_them(
    most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name in ("ours", "theirs"):
        model = adapted(PACKS["llama"])
        run = trainer(model, tmp_path / name, max_steps=2, learning_rate=1e-3, max_grad_norm=most, optim="sgd")
        run.train()
        assert "zero_grad" not in vars(model)
        assert all(parameter.grad is None for parameter in model.parameters())
        runs.append((weights(model), [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]))
        monkeypatch.setattr(BuleyeanTrainer, "_clip_grad_norm", Trainer._clip_grad_norm)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert 1e-2 < min(runs[0][1]) < max(runs[0][1]) < 1e3
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-9)


def test_freed_memory_is_kept_for_all_steps_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    @contextmanager
    def kept() -> Iterator[None]:
        happened.append("kept")
        yield
        happened.append("not kept")

    monkeypatch.setattr("buleyean_rl.training.trainer.freed_memory_retained", kept)
    run = trainer(adapted(PACKS["llama"]), tmp_path, max_steps=2)
    step = run.training_step
    monkeypatch.setattr(run, "training_step", lambda *given: happened.append("step") or step(*given))
    run.train()
    assert happened == ["kept", "step", "step", "not kept"]


def test_checkpointed_layers_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, calls, compute = [], [0], _Pass.__call__

    def counted(of_layer: _Pass, x: torch.Tensor, keep: bool) -> Any:
        calls[-1] += of_layer.layer.module.self_attn.layer_idx == 0
        return compute(of_layer, x, keep)

    monkeypatch.setattr(_Pass, "__call__", counted)
    for checkpointing in (False, True):
        calls.append(0)
        model = adapted(PACKS["llama"], dropout=0.2)
        settings = {"max_steps": 3, "learning_rate": 1e-3, "activation_checkpointing": checkpointing}
        trainer(model, tmp_path / str(checkpointing), **settings).train()
        outcomes.append(weights(model))
    _, plain, checkpointed = calls
    assert checkpointed == plain + 3  # once more in each backward pass
    assert outcomes[0].equal(outcomes[1])


def test_the_reference_is_computed_in_the_first_epoch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []

    def counted(model: Any, batches: list[Batch]) -> list[Batch]:
        computed.extend(batch.numbers for batch in batches if batch.reference is None)
        return add_references(model, batches)

    monkeypatch.setattr("buleyean_rl.training.trainer.add_references", counted)
    outcomes = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        computed.clear()
        model = adapted(PACKS["llama"], dropout=0.2)
        nodes, kept = [record.nodes for record in RECORDS], entry_format(output_head(model), Objective())
        references = ReferenceCache(folder, nodes, kept) if folder else None
        run = trainer(model, tmp_path / "run", num_train_epochs=3, learning_rate=1e-3, references=references)
        run.train()
        outcomes.append((sorted(number for row in computed for number in row), weights(model)))
    (without, plain), (first, once), (second, again) = outcomes
    assert without == sorted([*range(8)] * 3)
    assert first == [*range(8)]
    assert second == []
    torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-6)
    assert again.equal(once)


@pytest.mark.usefixtures("tiles")
def test_in_tiles_a_run_is_the_same_to_the_bit_however_much_is_kept_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmaxes, head_sums = [0], matmul.head_sums

    def counted(*given: Any) -> Any:
        softmaxes[-1] += 1
        return head_sums(*given)

    monkeypatch.setattr(matmul, "head_sums", counted)
    outcomes = []
    for with_rest in (False, True, True):
        softmaxes.append(0)
        torch.manual_seed(0)
        base = tiny_llama(TOKENIZER, head_dim=32, vocab_size=416).bfloat16()
        model = attach_lora(base, lora_config(4, 8, 0.0, None))
        nodes, kept = [record.nodes for record in RECORDS], entry_format(output_head(model), Objective())
        assert kept.with_rest
        references = ReferenceCache(tmp_path / str(with_rest), nodes, kept._replace(with_rest=with_rest))
        trainer(model, tmp_path / "run", num_train_epochs=2, learning_rate=1e-3, references=references).train()
        outcomes.append(weights(model))
    # two steps an epoch, in each the model's and, if it is not known, the reference's
    assert softmaxes[1:] == [8, 6, 4]
    assert outcomes[0].equal(outcomes[1])
    assert outcomes[0].equal(outcomes[2])
