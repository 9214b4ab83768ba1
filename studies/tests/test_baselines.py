"""The baselines of the studies by hand arithmetic, and behind the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baseline_trainer import KL, BaselineTrainer
from baselines import (
    BASELINES,
    FTPO_FREE,
    NEEDS_CHOSEN,
    Baseline,
    Scores,
    ascent,
    dpo,
    ftpo,
    kin_settings,
    kto,
    npo,
    sft,
    simnpo,
    unlikelihood,
)
from buleyean_rl.batching.forward import batch_losses
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import Objective, complement_loss
from buleyean_rl.training.config import BuleyeanConfig
from tiny import tiny_llama, tiny_tokenizer


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


def test_simnpo_by_hand() -> None:
    """Mean log pi = log 1/4: with beta = 1 and margin ln 2, -2 log sigmoid(ln 4 - ln 2) = -2 log(2 / 3)."""
    got = simnpo(scores([1 / 2, 1 / 8], base=[1.0]), 1.0, math.log(2))
    assert got.tolist() == pytest.approx([2 * math.log(3 / 2)])


def test_ftpo_by_hand() -> None:
    """One alternative within min-p, at the rejected token's logit: softplus(2). Another token moved by 3, both judged
    ones by FTPO_FREE + 2."""
    base = torch.tensor([[0.0, 0.0, -20.0]]).double()
    logits = base + torch.tensor([[FTPO_FREE + 2, FTPO_FREE + 2, 3.0]]).double()
    expected = math.log1p(math.exp(2)) + 0.4 * 9 + 0.05 * 4
    assert ftpo(logits, base, torch.tensor([0])).tolist() == pytest.approx([expected])
    above = torch.tensor([[0.0, 2.5, -20.0]]).double()  # beyond the margin it still has its weight, as alone
    assert ftpo(above, above, torch.tensor([0])).tolist() == pytest.approx([math.log1p(math.exp(-0.5))])


def test_undial_and_tnt_are_the_complement_at_other_settings() -> None:
    """Base 1/2, 1/4, 1/4, the first rejected: gamma = ln 3 makes it 1/6 of 2/3; without it the others share all."""
    base = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).double()
    counts = Counts(torch.tensor([0]), torch.tensor([0]), torch.ones(1).double(), torch.ones(1).double(), 1)
    pi = torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).double()
    targets = {("undial", math.log(3)): [1 / 4, 3 / 8, 3 / 8], ("tnt", 0.0): [0.0, 1 / 2, 1 / 2]}
    for (name, gamma), target in targets.items():
        settings = kin_settings(name, gamma)
        objective = Objective(settings.pop("objective"), **settings)
        kl = sum(p * math.log(3 * p) for p in target if p)
        assert complement_loss(pi.log(), base.log(), counts, objective).loss.tolist() == pytest.approx([kl], abs=1e-9)


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


@pytest.mark.parametrize("name", ["npo", "unlikelihood", "ftpo"])
def test_an_anchor_holds_the_base(name: str, tmp_path: Path) -> None:
    """With a heavy one the anchors' text moves less, and so do the tokens of an answer that were not rejected."""
    text = merge_responses([9, 8, 7], [([50, 51, 52, 53], [False] * 4)], [0], [1])
    half = [
        merge_responses([5 + n, 6, 7, 8], [([20, 30 + n, 40, 41], [False, False, True, True])], [1], [1])
        for n in range(4)
    ]

    def drift(weight: float) -> float:
        model = attach_lora(tiny_llama(tiny_tokenizer()), lora_config(4, 8, 0.0, None))
        config = BuleyeanConfig(
            output_dir=str(tmp_path), learning_rate=5e-3, num_train_epochs=8, warmup_steps=0, save_strategy="no"
        )
        anchors = [[text]] if weight else []
        BaselineTrainer(Baseline(name, anchor=weight), model, config, half, anchors=anchors).train()
        model.eval()
        own = Model.from_module(model)
        batch = LAYOUTS[own.layout]([text])
        return float(batch_losses(own.module, own.head, batch, KL).kl.mean())

    free, held = drift(0.0), drift(10.0)
    assert 0 < held < free / 2
