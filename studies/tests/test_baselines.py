"""The baselines of the studies by hand arithmetic, and behind the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baselines import NEEDS_CHOSEN, Baseline, BaselineTrainer, Scores, ascent, dpo, kto, npo, sft, unlikelihood
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.training.config import BuleyeanConfig
from tiny import tiny_llama, tiny_tokenizer

BASELINES = ["ascent", "unlikelihood", "npo", "kto", "dpo", "sft"]


def scores(*answers: list[float], base: list[float]) -> Scores:
    """Answers as the probabilities of their tokens; the base's probability of each whole answer."""
    tokens = torch.tensor([p for answer in answers for p in answer]).double().log()
    which = torch.tensor([number for number, answer in enumerate(answers) for _ in answer])
    policy = torch.tensor([math.prod(answer) for answer in answers]).double().log()
    return Scores(tokens, which, policy, torch.tensor(base).double().log())


def test_token_losses_by_hand() -> None:
    two = scores([1 / 2, 1 / 8], [3 / 4], base=[1 / 16, 3 / 4])
    assert ascent(two).tolist() == pytest.approx([-2 * math.log(2), math.log(3 / 4)])
    assert unlikelihood(two).tolist() == pytest.approx([(math.log(2) + math.log(8 / 7)) / 2, math.log(4)])
    assert sft(two).tolist() == pytest.approx([2 * math.log(2), math.log(4 / 3)])


def test_npo_by_hand() -> None:
    """pi / pi_base = 3 and 1: with beta = 1, -2 log(1 / (1 + 3)) and -2 log(1/2)."""
    assert npo(scores([3 / 8], [1 / 2], base=[1 / 8, 1 / 2]), 1.0).tolist() == pytest.approx(
        [2 * math.log(4), 2 * math.log(2)]
    )


def test_kto_by_hand() -> None:
    """pi / pi_base = 3, z = ln 2, beta = 1: 1 - sigmoid(ln 2 - ln 3) = 1 - 2/5."""
    got = kto(scores([3 / 8], base=[1 / 8]), torch.tensor(math.log(2)).double(), 1.0)
    assert got.tolist() == pytest.approx([3 / 5])


def test_dpo_by_hand() -> None:
    """Ratios 4 for the chosen and 2 for the rejected: with beta = 1, -log(2 / 3)."""
    got = dpo(scores([1 / 2], base=[1 / 8]), scores([1 / 2], base=[1 / 4]), 1.0)
    assert got.tolist() == pytest.approx([math.log(3 / 2)])


def pairs() -> list[Boundary]:
    """Four prompts with a chosen answer (count 0) and a rejected one, alike in their first token."""
    prompts = [[5 + n, 6, 7, 8] for n in range(4)]
    answers = [([20, 30 + n, 31], [False] * 3) for n in range(4)]
    wrong = [([20, 40 + n, 41, 42], [True] * 4) for n in range(4)]
    return [
        merge_responses(*row, [0, 1], [1, 1])
        for row in zip(prompts, map(list, zip(answers, wrong, strict=True)), strict=True)
    ]


def alone() -> list[Boundary]:
    return [merge_responses([5 + n, 6, 7, 8], [([20, 40 + n, 41, 42], [True] * 4)], [1], [1]) for n in range(4)]


def logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(answer).unsqueeze(1)).sum()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains(name: str, tmp_path: Path) -> None:
    """Untrained, its loss is what it is at pi = pi_base; trained, the rejected answers have moved as it wants."""
    boundaries = pairs() if name in NEEDS_CHOSEN else alone()
    model = attach_lora(tiny_llama(tiny_tokenizer()), lora_config(4, 8, 0.0, None))
    config = BuleyeanConfig(
        output_dir=str(tmp_path), learning_rate=5e-3, num_train_epochs=8, warmup_steps=0, save_strategy="no"
    )
    trainer = BaselineTrainer(Baseline(name), model, config, boundaries)
    rejected, chosen = ([5, 6, 7, 8], [20, 40, 41, 42]), ([5, 6, 7, 8], [20, 30, 31])
    plain = [logprob(model, *answer) for answer in (rejected, chosen)]
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "floor" in entry)
    expected = {"npo": 20 * math.log(2), "kto": 1 / 2, "dpo": math.log(2)}
    if name in expected:
        assert first == pytest.approx(expected[name], abs=1e-4)
    model.eval()
    trained = [logprob(model, *answer) for answer in (rejected, chosen)]
    if name in NEEDS_CHOSEN:
        assert trained[1] - trained[0] > plain[1] - plain[0]
    else:
        assert trained[0] < plain[0]
