"""Continuous batching: a sequence's tokens are its own, whatever is computed beside it and whatever room there is."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import torch

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.decoding import BatchDecoder, Drawn, Request
from buleyean_rl.kernels.decode import CACHE_BLOCK
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.cached_decoder import CachedDecoder
from buleyean_rl.models.lora import lora_config
from marks import needs_c
from tiny import tiny_llama, tiny_tokenizer

pytestmark = needs_c
CONTEXT = 256
END = {17, 33, 101}


@pytest.fixture(scope="module")
def decoder() -> CachedDecoder:
    model = tiny_llama(tiny_tokenizer(), head_dim=32, vocab_size=416).bfloat16()
    return CachedDecoder(model)


def batch_decoder(decoder: CachedDecoder, parallel: int = 64, blocks: int = 1000) -> BatchDecoder:
    return BatchDecoder(
        decoder,
        end_tokens=END,
        context=CONTEXT,
        cache_bytes=2 * blocks * decoder.decoder.block_numbers,
        parallel=parallel,
    )


def adapted(model: Any) -> Any:
    """With an adapter that changes what the model says."""
    peft = attach_lora(model, lora_config(8, 16, 0.0, None))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return peft.eval()


def requests(count: int) -> list[Request]:
    """Of uneven lengths; some greedy, some that share their beginning."""
    system = [3 * i % 400 for i in range(2 * CACHE_BLOCK + 1)]
    return [
        Request(
            [*(system if i % 3 else []), *((i * j) % 400 for j in range(1, 2 + i * 7 % 40))],
            1 + i * 13 % 60,
            temperature=0.0 if i % 2 else 1.3,
            top_p=0.95,
            seed=i,
        )
        for i in range(count)
    ]


def answers(drawn: list[Drawn]) -> dict[int, list[tuple[int, float]]]:
    collected: dict[int, list[tuple[int, float]]] = {}
    for each in drawn:
        collected.setdefault(each.request, []).append((each.token, each.logprob))
    return collected


@pytest.fixture(scope="module")
def alone(decoder: CachedDecoder) -> list[list[tuple[int, float]]]:
    return [answers(list(batch_decoder(decoder, parallel=1).run([request])))[0] for request in requests(40)]


@pytest.mark.parametrize(("parallel", "blocks"), [(64, 1000), (5, 1000), (64, 20), (64, 1)])
def test_the_same_tokens_alone_and_beside_others(
    decoder: CachedDecoder, alone: list[list[tuple[int, float]]], parallel: int, blocks: int
) -> None:
    batch = batch_decoder(decoder, parallel, blocks)
    drawn = list(batch.run(requests(40)))
    together = answers(drawn)
    assert [together[i] for i in range(40)] == alone
    assert {each.request for each in drawn if each.is_last} == set(range(40))
    again = answers(list(batch.run(requests(40)[::-1])))  # in another order, with blocks of the first time
    assert [again[39 - i] for i in range(40)] == alone


def test_the_same_with_an_adapter_alone_and_among_63_others() -> None:
    decoder = CachedDecoder(adapted(tiny_llama(tiny_tokenizer(), head_dim=32, vocab_size=416).bfloat16()))
    together = answers(list(batch_decoder(decoder).run(requests(64))))
    backwards = answers(list(batch_decoder(decoder).run(requests(64)[::-1])))
    assert [backwards[63 - i] for i in range(64)] == [together[i] for i in range(64)]
    for i in (0, 1, 30, 63):
        assert answers(list(batch_decoder(decoder).run([requests(64)[i]])))[0] == together[i]


def test_every_sequence_ends_where_it_must(alone: list[list[tuple[int, float]]]) -> None:
    for request, drawn in zip(requests(40), alone, strict=True):
        tokens = [token for token, _ in drawn]
        assert len(tokens) == request.max_tokens or tokens[-1] in END
        assert not END & set(tokens[:-1])
    assert any(len(drawn) < request.max_tokens for request, drawn in zip(requests(40), alone, strict=True))


def test_a_request_can_stop_itself(decoder: CachedDecoder) -> None:
    stopped = Request([1, 2, 3], 50, temperature=1.0, seed=4, is_stopped=lambda drawn: len(drawn) == 3)
    assert len(list(batch_decoder(decoder).run([stopped, *requests(2)[1:]]))) >= 3
    assert len(answers(list(batch_decoder(decoder).run([stopped])))[0]) == 3


def test_answers_come_as_they_are_done(decoder: CachedDecoder) -> None:
    long, short = Request([5], 100, temperature=1.0, seed=1), Request([6], 2)
    ended = [drawn.request for drawn in batch_decoder(decoder, 2).run([long, short, short, short]) if drawn.is_last]
    assert set(ended) == {0, 1, 2, 3}
    assert ended.index(0) == 3 or len(answers(list(batch_decoder(decoder).run([long])))[0]) < 4


def test_closing_frees_everything(decoder: CachedDecoder) -> None:
    batch = batch_decoder(decoder, blocks=64)
    with closing(batch.run(requests(40))) as drawn:
        next(drawn)
        assert batch._cache.free < 64
    assert batch._cache.free == 64


def test_two_threads_at_once(decoder: CachedDecoder, alone: list[list[tuple[int, float]]]) -> None:
    batch, results = batch_decoder(decoder, blocks=64), {}

    def work(half: int) -> None:
        results[half] = answers(list(batch.run(requests(40)[half::2])))

    threads = [threading.Thread(target=work, args=(half,)) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for half in range(2):
        assert [results[half][i] for i in range(20)] == alone[half::2]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny_llama(tiny_tokenizer(), head_dim=32, vocab_size=416, tie=False).bfloat16()
    decoder = CachedDecoder(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(EngineError, match="logits are not numbers"):
        list(batch_decoder(decoder).run(requests(2)))
