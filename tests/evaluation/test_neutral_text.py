"""Likelihoods of texts and rejections, against a plain log-softmax."""

from __future__ import annotations

import pytest
import torch

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.trie import merge_responses
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.models.model import Model
from tiny import SENTENCES, tiny_mistral, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def plain_nll(text: str) -> tuple[float, int]:
    """Nats of a text's tokens but the first, and how many those are."""
    ids = torch.tensor([TOKENIZER(text).input_ids])
    with torch.no_grad():
        log_pi = tiny_mistral(TOKENIZER)(ids).logits.log_softmax(-1)
    return -log_pi[0, :-1].gather(1, ids[0, 1:, None]).sum().item(), ids.shape[1] - 1


@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_mean_nll_of_texts_is_that_of_the_logits(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.evaluation.neutral_text.micro_batch_tokens", lambda _: limit)
    texts = [neutral_boundary(Encoder(TOKENIZER, 64), text) for text in SENTENCES[:5]]
    nats, tokens = zip(*map(plain_nll, SENTENCES[:5]), strict=True)
    got = mean_nll(Model.from_module(tiny_mistral(TOKENIZER)), [text for text in texts if text is not None])
    assert got == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)


def test_mean_nll_of_rejections_weighs_each_by_its_rate() -> None:
    """Two answers of one token each, rejected in 3 and 1 of 4 rounds, beside a third never."""
    boundary = merge_responses([5, 6, 7], [([20], [True]), ([30], [True]), ([40], [False])], [3, 1, 9], 4)
    with torch.no_grad():
        log_pi = tiny_mistral(TOKENIZER)(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    expected = -(0.75 * log_pi[20] + 0.25 * log_pi[30]).item()
    assert mean_nll(Model.from_module(tiny_mistral(TOKENIZER)), [boundary]) == pytest.approx(expected, rel=1e-4)


def test_a_neutral_text_needs_two_tokens_and_is_cut() -> None:
    assert neutral_boundary(Encoder(TOKENIZER), "") is None
    assert neutral_boundary(Encoder(TOKENIZER), "a") is None
    boundary = neutral_boundary(Encoder(TOKENIZER, 5), SENTENCES[0])
    assert boundary is not None
    assert boundary.prompt + boundary.tokens == TOKENIZER(SENTENCES[0]).input_ids[:5]
