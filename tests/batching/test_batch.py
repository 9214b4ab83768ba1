"""Packed, padded, alone: three ways to lay out a record, one loss and one gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buleyean_rl.batching.batch import Batch, collect_answers, concatenate, pack, pad_paths
from buleyean_rl.batching.forward import answer_logprobs, batch_losses, forward_hidden
from buleyean_rl.batching.layout import make_batch
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.segments import ROUND
from buleyean_rl.models.views import backbone, output_head, plain_model
from buleyean_rl.objectives.fused import fused_loss
from buleyean_rl.objectives.losses import NodeLosses, Objective
from tiny import tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
Layout = Callable[[list[Boundary]], Batch]

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(TOKENIZER),
    "qwen2": lambda: tiny_qwen2(TOKENIZER),
    "mistral that forgets": lambda: tiny_mistral(TOKENIZER, sliding_window=4),
    "gpt2": lambda: tiny_model("GPT2LMHeadModel", TOKENIZER, n_positions=64),
    "gemma3, every other layer forgets": lambda: tiny_model(
        "Gemma3ForCausalLM",
        TOKENIZER,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
both_layouts = pytest.mark.parametrize("layout", [pack, pad_paths])
both_objectives = pytest.mark.parametrize("objective", [Objective(), Objective("published")], ids=lambda o: o.name)


def boundary(prompt: list[int], *responses: list[int], counts: tuple[int, ...], rounds: int = 9) -> Boundary:
    """Whole responses, but for the last one: of that only the second half is rejected."""
    flags = [[True] * len(ids) for ids in responses]
    flags[-1][: len(flags[-1]) // 2] = [False] * (len(flags[-1]) // 2)
    return merge_responses(prompt, list(zip(responses, flags, strict=True)), counts, [rounds] * len(counts))


TREE = boundary(
    [11, 12, 13, 14, 15],
    [20, 21, 22, 23, 24, 25, 26, 27],
    [20, 21, 30, 31, 32],
    [20, 21, 22, 40, 41, 42, 43],
    [50, 51],
    [20, 21, 30, 31, 60, 61, 62],
    counts=(4, 1, 2, 9, 3),
)
RECORDS = [TREE, boundary([9], [20, 21, 22], counts=(1,)), boundary(list(range(70, 83)), [5], [6, 7], counts=(2, 2))]


def adapted(make: Callable[[], Any]) -> Any:
    """The model with an adapter that already does something."""
    model = attach_lora(make(), lora_config(4, 8, 0.0, None))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model.eval()


def use(model: Any, layout: Layout) -> None:
    """Give the model the attention a layout needs: packed rows need ours, padded ones work with transformers'."""
    plain_model(model).set_attn_implementation(PACKED if layout is pack else "sdpa")


def losses(model: Any, layout: Layout, boundaries: list[Boundary], objective: Objective) -> NodeLosses:
    use(model, layout)
    return batch_losses(model, output_head(model), layout(boundaries), objective)


def hidden(model: Any, layout: Layout, boundaries: list[Boundary]) -> Tensor:
    use(model, layout)
    with torch.no_grad():
        return forward_hidden(backbone(model), layout(boundaries))


# --- against a plain forward pass, one sequence at a time


@both_layouts
@every_model
def test_a_trie_has_the_losses_of_separate_sequences(make: Callable[[], Any], layout: Layout) -> None:
    """At every node: the hidden state transformers gives the prompt and the path to the node, alone in a row."""
    model = make()
    expected = []
    for one in RECORDS:
        for run in one.run_slices():
            path = [token for piece in one.path(run.stop) for token in one.tokens[piece]]
            with torch.no_grad():
                row = backbone(model)(input_ids=torch.tensor([one.prompt + path]), use_cache=False)
            new_nodes = run.stop - run.start + (run.start == 0)  # the first run brings the prompt's end
            expected.append(row.last_hidden_state[0, -new_nodes:])
    torch.testing.assert_close(hidden(model, layout, RECORDS), torch.cat(expected), rtol=1e-4, atol=1e-4)


@both_objectives
@every_model
def test_packed_is_padded_in_loss_and_gradient(make: Callable[[], Any], objective: Objective) -> None:
    model = adapted(make)
    results = []
    for layout in (pack, pad_paths):
        model.zero_grad()
        got = losses(model, layout, RECORDS, objective)
        got.loss.sum().backward()
        results.append((got, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (packed, packed_grads), (padded, padded_grads) = results
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    largest = max(gradient.abs().max() for gradient in padded_grads.values())
    assert largest > 1e-3
    torch.testing.assert_close(packed_grads, padded_grads, rtol=1e-3, atol=1e-5 * largest.item())


@both_objectives
@both_layouts
def test_a_record_does_not_depend_on_its_batch(layout: Layout, objective: Objective) -> None:
    model = adapted(MODELS["llama"])
    together = losses(model, layout, RECORDS, objective)
    owner = layout(RECORDS).record
    for index, record in enumerate(RECORDS):
        alone = losses(model, layout, [record], objective)
        mine = NodeLosses(*(part[owner == index] for part in together))
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)


@both_layouts
def test_padding_and_other_records_content_change_nothing(layout: Layout) -> None:
    model = MODELS["llama"]()
    use(model, layout)
    batch = layout(RECORDS)
    with torch.no_grad():
        before = forward_hidden(backbone(model), batch)
        if layout is pad_paths:
            assert batch.attention_mask is not None
            batch.input_ids[batch.attention_mask == 0] = 77
            torch.testing.assert_close(forward_hidden(backbone(model), batch), before)
        first = batch.record == 0
        others = boundary([33, 34], [35, 36, 37, 38], counts=(3,))
        after = forward_hidden(backbone(model), layout([RECORDS[0], others]))
    torch.testing.assert_close(after[: first.sum()], before[first], rtol=1e-4, atol=1e-5)


# --- what has a loss


class Echo(torch.nn.Module):
    """A stand-in model that sees one token: a hidden state is the embedding of the token that stands there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 8)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))


@both_layouts
def test_prompt_tokens_have_no_loss(layout: Layout) -> None:
    """Only the last token of a prompt predicts: without context, the others change neither loss nor gradient."""
    torch.manual_seed(0)
    model, head = Echo(), output_head(tiny_llama(TOKENIZER, hidden_size=8, num_attention_heads=2))
    results = []
    for prompt in ([11, 12, 13, 14, 15], [91, 92, 93, 94, 15]):
        batch = layout([Boundary(prompt, TREE.tokens, TREE.runs, TREE.parents, TREE.judgements)])
        model.zero_grad()
        states = forward_hidden(model, batch)
        got = fused_loss(states, head, batch.counts, Objective(), states.detach() / 2).loss
        got.sum().backward()
        assert model.embed.weight.grad is not None
        results.append((got.detach(), model.embed.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not results[0][1][[11, 12, 13, 14, 91, 92, 93, 94]].any()
    assert results[0][1][15].any()


@both_layouts
def test_nodes_are_at_the_ends_of_their_paths(layout: Layout) -> None:
    batch = layout(RECORDS)
    ids, positions = batch.input_ids.flatten()[batch.nodes], batch.position_ids.flatten()[batch.nodes]
    expected = []
    for record in RECORDS:
        for node in range(record.nodes):
            path = record.prompt + [token for piece in record.path(node) for token in record.tokens[piece]]
            expected.append((path[-1], len(path) - 1))
    assert list(zip(ids.tolist(), positions.tolist(), strict=True)) == expected


def test_packing_computes_every_token_once() -> None:
    batch = pack(RECORDS)
    assert batch.tokens == sum(len(r.prompt) + len(r.tokens) for r in RECORDS)
    assert batch.input_ids.numel() == batch.tokens + batch.padding
    assert batch.input_ids.numel() % ROUND == 0
    assert batch.segments is not None
    assert sum(segment.length for segment in batch.segments) == batch.input_ids.numel()
    assert pad_paths(RECORDS).input_ids.numel() > batch.input_ids.numel()


def test_concatenated_batches_are_the_batches() -> None:
    model = tiny_llama(TOKENIZER)
    model.set_attn_implementation(PACKED)
    rows = [pack(RECORDS), pack([TREE]), pack(RECORDS[:1])]
    with torch.no_grad():
        expected = torch.cat([forward_hidden(backbone(model), row) for row in rows])
        got = forward_hidden(backbone(model), concatenate(rows))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_without_anchors_only_nodes_with_rejections_remain() -> None:
    whole = pack(RECORDS)
    batch = whole.without_anchors()
    assert len(batch.nodes) < len(whole.nodes)
    assert set(batch.counts.node.tolist()) == set(range(len(batch.nodes)))
    rejected = whole.counts.dense(whole.counts.count, 100)
    assert torch.equal(batch.counts.dense(batch.counts.count, 100), rejected[rejected.any(-1)])
    assert torch.equal(batch.nodes, whole.nodes[rejected.any(-1)])
    assert torch.equal(batch.record, whole.record[rejected.any(-1)])


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)
tries = st.builds(
    lambda prompt, responses: boundary(prompt, *responses, counts=(1,) * len(responses)),
    tokens,
    st.lists(tokens, min_size=1, max_size=5),
)


@given(st.lists(tries, min_size=1, max_size=4))
def test_every_index_of_a_batch_points_at_something(boundaries: list[Boundary]) -> None:
    """No -100 and no padding id stands for a target: what has no loss is not in the batch."""
    for layout in (pack, pad_paths):
        batch = layout(boundaries)
        assert len(batch.nodes) == batch.counts.nodes == len(batch.record) == sum(b.nodes for b in boundaries)
        assert ((batch.nodes >= 0) & (batch.nodes < batch.input_ids.numel())).all()
        assert ((batch.counts.node >= 0) & (batch.counts.node < len(batch.nodes))).all()
        assert (batch.counts.node.diff() >= 0).all()
        assert (batch.counts.option >= 0).all()
        assert (batch.input_ids >= 0).all()
        if batch.attention_mask is not None:
            assert batch.attention_mask.flatten()[batch.nodes].all()


@settings(max_examples=15)
@given(st.lists(tries, min_size=1, max_size=3))
def test_any_packed_tries_equal_padded_ones(boundaries: list[Boundary]) -> None:
    model = MODEL_OF_ANY_TRIES
    torch.testing.assert_close(
        hidden(model, pack, boundaries), hidden(model, pad_paths, boundaries), rtol=1e-4, atol=1e-4
    )


MODEL_OF_ANY_TRIES = tiny_mistral(TOKENIZER, sliding_window=3)


def test_outside_a_packed_batch_the_attention_is_plain_causal() -> None:
    """As in generation: the same logits as with transformers' own attention."""
    model, ids = tiny_mistral(TOKENIZER, sliding_window=4), torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation(PACKED)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_answers_are_the_separate_sequences() -> None:
    """Two records, one of them TREE: every answer's likelihood is that of its own sequence, prefixes shared or not."""
    answers = [[20, 21, 22, 23, 24, 25, 26, 27], [20, 21, 30, 31, 32], [20, 21, 22, 40, 41, 42, 43], [50, 51]]
    answers.append([20, 21, 30, 31, 60, 61, 62])
    other = boundary([11, 70], [71, 72], [71], counts=(3, 0))
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, None)).eval()
    plain_model(model).set_attn_implementation(PACKED)
    batch, both = pack([TREE, other]), collect_answers([TREE, other])
    with torch.no_grad():
        hidden = forward_hidden(backbone(model), batch)
        got = answer_logprobs(hidden, output_head(model), both)
        expected = []
        for prompt, answer in [(TREE.prompt, answer) for answer in answers] + [([11, 70], [71, 72]), ([11, 70], [71])]:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(logits.gather(1, torch.tensor(answer).unsqueeze(1)).sum())
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert both.counts.node.tolist() == [0] * 5 + [1] * 2
    assert both.counts.count.tolist() == [4, 1, 2, 9, 3, 3, 0]


def test_an_answer_with_two_sets_of_spans_is_one_answer() -> None:
    twice = merge_responses([1], [([2, 3], [True, False]), ([2, 3], [False, True])], [2, 3], [5, 5])
    merged = collect_answers([twice])
    assert (merged.counts.count.tolist(), merged.rejected.tolist()) == ([5], [True, True])


@pytest.mark.parametrize(
    "objective", [Objective(), Objective("published"), Objective("listwise")], ids=lambda o: o.name
)
def test_a_rejection_weighs_the_same_whatever_else_its_prompt_has(objective: Objective) -> None:
    """Thirty answers to one prompt, each rejected once, or one of them: rounds, and what a loss is divided by."""
    answers = [([40 + k, 80 + k, 9], [True] * 3) for k in range(30)]
    liked = ([39, 9], [True] * 2)
    crowd = merge_responses([5, 6], [*answers, liked], [1] * 30 + [0], [1] * 30 + [7])
    alone = merge_responses([5, 6], [answers[0], liked], [1, 0], [1, 7])
    other = merge_responses([7], [([8, 9, 10, 11], [True] * 4)], [1], [1])
    batches = [make_batch("packed", [trie, other], objective) for trie in (crowd, alone)]
    assert batches[0].normaliser == batches[1].normaliser
    for batch, answers_rejected in zip(batches, (31, 2), strict=True):
        if batch.weights is not None:  # of the liked answer, two nodes of three are its own
            assert batch.weights.sum().item() == pytest.approx(answers_rejected + 2 / 3)
    for batch in batches:
        counts = batch.counts if batch.answers is None else batch.answers.counts
        rejected = counts.count > 0
        assert set(counts.count[rejected].tolist()) == set(counts.rounds[rejected].tolist()) == {1}


def test_anchors_weigh_what_they_are_told_and_divide_nothing() -> None:
    rejected = merge_responses([5, 6], [([8, 9], [True] * 2)], [1], [1])
    accepted = merge_responses([7], [([8, 9, 10, 11], [True] * 4)], [0], [1])
    batch = make_batch("packed", [rejected, accepted], Objective(), anchor_weight=0.25)
    assert batch.weights is not None
    assert batch.weights[batch.record == 1].sum().item() == pytest.approx(0.25)
    assert batch.weights[batch.record == 0].sum().item() == pytest.approx(1)
    assert batch.normaliser == 1


def test_published_reads_the_answers_of_a_record_as_judged_in_the_same_rounds() -> None:
    shared = merge_responses([1], [([2, 3], [True] * 2), ([2, 4], [True] * 2)], [45, 12], [60, 60])
    for objective, rounds in ((Objective(), [120, 60, 60]), (Objective("published"), [60, 60, 60])):
        counts = make_batch("packed", [shared], objective).counts
        assert (counts.count.tolist(), counts.rounds.tolist()) == ([57, 45, 12], rounds)


def test_listwise_of_an_untrained_model_has_even_ratios() -> None:
    """Before training every log-ratio is 0, so pi is uniform over the answers."""
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, None)).eval()
    plain_model(model).set_attn_implementation(PACKED)
    batch = replace(pack([TREE]), answers=collect_answers([TREE]))
    losses = batch_losses(model, output_head(model), batch, Objective("listwise"))
    weights = torch.tensor([6.0, 9, 8, 1, 7]) / 31
    torch.testing.assert_close(losses.kl, (weights * (5 * weights).log()).sum().view(1), atol=1e-5, rtol=1e-5)
    assert losses.loss.shape == (1,)
    assert losses.loss.requires_grad
