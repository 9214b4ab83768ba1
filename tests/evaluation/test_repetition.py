"""Loops counted by hand, and likelihoods against a plain log-softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.batching.layout import choose_layout, make_batch
from buleyean_rl.data.trie import merge_responses
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.evaluation.repetition import is_looping, loop_rate, repeated_spans, repetition
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.views import backbone, output_head
from buleyean_rl.objectives.losses import Objective, complement_loss, published_loss
from buleyean_rl.training.held_out import HeldOut
from tiny import SENTENCES, tiny_llama, tiny_mistral, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


# --- loops


@pytest.mark.parametrize(
    ("text", "grams", "repeats", "spans"),
    [
        ("", 0, 0, []),
        ("a b c d", 1, 0, []),
        ("a b c d a b c d", 5, 1, ["a b c d"]),  # abcd bcda cdab dabc abcd
        ("a a a a a a", 3, 2, ["a a a a a"]),  # the second and third gram begin at the second a
        ("No. No. No. No.", 5, 3, ["No. No. No."]),  # a full stop is a unit too
        ("No! NO! no! nO!", 5, 3, ["NO! no! nO!"]),  # case does not count
        ("再见再见再见", 3, 1, ["再见再见"]),  # unspaced scripts: a character is a unit
        ("🙂🙂🙂🙂🙂", 2, 1, ["🙂🙂🙂🙂"]),
        ("über Öl ÜBER öl über Öl", 3, 1, ["ÜBER öl über Öl"]),
    ],
)
def test_repeats_by_hand(text: str, grams: int, repeats: int, spans: list[str]) -> None:
    assert repetition(text) == (repeats / grams if grams else 0)
    assert [text[start:end] for start, end in repeated_spans(text)] == spans


words = st.lists(st.sampled_from(["a", "b", "é", "漢", "🙂", ".", "\n"]), max_size=30).map(" ".join)


@given(words)
def test_spans_lie_in_the_text_in_order_and_apart(text: str) -> None:
    spans = repeated_spans(text)
    assert bool(spans) == (repetition(text) > 0)
    flat = [edge for span in spans for edge in span]
    assert flat == sorted(set(flat))
    assert all(0 <= edge <= len(text) for edge in flat)
    assert all(text[start:end] == text[start:end].strip() for start, end in spans)
    assert 0 <= repetition(text) < 1


def test_an_answer_loops_above_three_tenths() -> None:
    ten_grams = "a b c d e f a b c d e f g"  # 10 grams, 3 of them repeats: exactly 0.3
    assert repetition(ten_grams) == 0.3
    assert not is_looping(ten_grams)
    assert is_looping("a b c d e f g a b c d e f g")  # 4 of 11
    assert loop_rate(["fine", "no no no no no no", ten_grams, "la la la la la la"]) == 0.5


# --- likelihoods


def plain_nll(text: str) -> tuple[float, int]:
    """Nats of a text's tokens but the first, and how many those are."""
    ids = torch.tensor([TOKENIZER(text).input_ids])
    with torch.no_grad():
        log_pi = tiny_mistral(TOKENIZER)(ids).logits.log_softmax(-1)
    return -log_pi[0, :-1].gather(1, ids[0, 1:, None]).sum().item(), ids.shape[1] - 1


@pytest.mark.parametrize("row", [1, 40, 1000])
def test_mean_nll_of_texts_is_the_plain_one(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.evaluation.neutral_text.micro_batch_tokens", lambda _: row)
    texts = [neutral_boundary(TOKENIZER, text, 64) for text in SENTENCES[:5]]
    nats, tokens = zip(*map(plain_nll, SENTENCES[:5]), strict=True)
    got = mean_nll(tiny_mistral(TOKENIZER), [text for text in texts if text is not None])
    assert got == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)


def test_mean_nll_of_rejections_weighs_each_by_its_rate() -> None:
    """Two answers of one token each, rejected in 3 and 1 of 4 rounds, beside a third never."""
    boundary = merge_responses([5, 6, 7], [([20], [True]), ([30], [True]), ([40], [False])], [3, 1, 9], 4)
    with torch.no_grad():
        log_pi = tiny_mistral(TOKENIZER)(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    expected = -(0.75 * log_pi[20] + 0.25 * log_pi[30]).item()
    assert mean_nll(tiny_mistral(TOKENIZER), [boundary]) == pytest.approx(expected, rel=1e-4)


def test_a_neutral_text_needs_two_tokens_and_is_cut() -> None:
    assert neutral_boundary(TOKENIZER, "", 64) is None
    assert neutral_boundary(TOKENIZER, "a", 64) is None
    boundary = neutral_boundary(TOKENIZER, SENTENCES[0], 5)
    assert boundary is not None
    assert boundary.prompt + boundary.tokens == TOKENIZER(SENTENCES[0]).input_ids[:5]


@pytest.mark.parametrize("name", ["complement", "published"])
def test_mean_losses_are_the_dense_ones_without_dropout(name: str) -> None:
    objective = Objective(name)  # type: ignore[arg-type]
    boundaries = [
        merge_responses([5, 6, 7], [([20, 21], [True, True]), ([20, 30, 31], [True] * 3)], [3, 1], 4),
        merge_responses([9], [([21, 22, 23, 24], [False, False, True, True])], [2], 2),
        merge_responses([9, 8], [([50], [True])], [1], 2),
    ]
    torch.manual_seed(0)
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.5, None))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    held_out = HeldOut(model, boundaries, objective)
    got = held_out.measure()
    assert got == held_out.measure()
    assert got.pop("rejected_nll") == pytest.approx(mean_nll(model, boundaries))
    assert model.training

    model.eval()
    batch = make_batch(choose_layout(model), boundaries, objective)
    with torch.no_grad():
        logits = output_head(model)(forward_hidden(backbone(model), batch))
        with model.disable_adapter():
            reference = output_head(model)(forward_hidden(backbone(model), batch))
    expected = (
        complement_loss(logits, reference, batch.counts, objective)
        if objective.uses_reference
        else published_loss(logits, batch.counts, objective)
    )
    assert got == pytest.approx({part: value.mean().item() for part, value in expected._asdict().items()}, rel=1e-4)
