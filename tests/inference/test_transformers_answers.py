"""Answers are transformers' own, for every architecture that exports, whichever decoder computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from marks import needs_c
from shapes import SHAPES, make_shape
from tiny import tiny_tokenizer

CONVERSATIONS = [[{"role": "user", "content": word}] for word in ("Hello", "1 2 3", "fox", "How do you sleep?")]
GREEDY = Sampling(max_tokens=12, logprobs=True)
KERNEL_SIZES = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 416}
IN_KERNEL = {"llama", "llama-wide", "qwen2", "qwen3"}


def make_engine(model: Any, batch: int = 3) -> TransformersEngine:
    return TransformersEngine(model, tiny_tokenizer(), batch=batch, context=256)


def answers_of(engine: TransformersEngine, sampling: Sampling = GREEDY) -> list[Answer]:
    tokens: list[int] = []
    outcomes = dict(engine.answers(CONVERSATIONS, sampling, on_tokens=tokens.append))
    answers = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Answer)]
    assert len(answers) == len(CONVERSATIONS)
    assert sum(tokens) == sum((answer.tokens or 0) + (answer.tokens != sampling.max_tokens) for answer in answers)
    return answers


def drawn_logprobs(answers: list[Answer]) -> torch.Tensor:
    """Of the tokens of all answers that are exactly their tokens."""
    exact = [answer.logprobs or () for answer in answers if answer.token_ids is not None]
    return torch.tensor([logprob for logprobs in exact for logprob in logprobs], dtype=torch.float64)


def rescored(model: Any, engine: TransformersEngine, answers: list[Answer]) -> torch.Tensor:
    """The same in the model's own forward pass."""
    scores = []
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        if answer.token_ids is None:
            continue
        prompt, drawn = engine.prompt_ids(messages), torch.tensor(answer.token_ids, dtype=torch.long)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        scores.append(logits.double().log_softmax(-1).gather(-1, drawn[:, None])[:, 0])
    return torch.cat(scores)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_are_those_of_transformers_in_fp64(shape: str) -> None:
    model = make_shape(shape).double()
    # torch's attention makes NaN of Gemma's padding in fp64
    engine = make_engine(model, batch=1 if "gemma" in shape else 3)
    answers = answers_of(engine)
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        ids = torch.tensor([engine.prompt_ids(messages)])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        drawn = generated[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(drawn) if token in engine._eos_token_ids), len(drawn))
        assert answer.text == engine.tokenizer.decode(drawn[:end], skip_special_tokens=True)
        assert answer.token_ids in (None, tuple(drawn[:end]))
        assert answer.logprobs is not None
        assert len(answer.logprobs) == end
    assert any(answer.token_ids for answer in answers)


@needs_c
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_are_within_rounding_in_bf16(shape: str) -> None:
    sizes = KERNEL_SIZES | ({"query_pre_attn_scalar": 32} if "gemma" in shape else {})
    if shape == "phi3-long":
        sizes = {"vocab_size": 416}  # its factors are for narrower heads
    if shape == "qwen2":
        sizes |= {"hidden_size": 128}
    model = make_shape(shape, **sizes).bfloat16()
    engine = make_engine(model, batch=1 if "gemma" in shape else 3)
    assert engine.is_batched is (shape not in IN_KERNEL)
    answers = answers_of(engine)
    ours = drawn_logprobs(answers)
    theirs = rescored(model, engine, answers)
    exact = rescored(model.double(), engine, answers)
    assert len(ours) == len(exact) > 4
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean() + 0.01


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_asking_for_log_probabilities_changes_no_answer(temperature: float) -> None:
    engine = make_engine(make_shape("qwen3"))
    plain = answers_of(engine, Sampling(max_tokens=9, temperature=temperature, seed=5))
    scored = answers_of(engine, Sampling(max_tokens=9, temperature=temperature, seed=5, logprobs=True))
    assert [answer[:4] for answer in plain] == [answer[:4] for answer in scored]
    assert {answer.logprobs for answer in plain} == {None}
    assert torch.allclose(drawn_logprobs(scored), rescored(engine.model, engine, scored), atol=1e-3)
