"""Anchors: which there are, which a step takes, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapted import TOKENIZER, adapted, stir
from buleyean_rl.batching.layout import ANCHOR_SHARE
from buleyean_rl.data.token_store import BoundaryFile, write_boundaries
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training import anchors as module
from buleyean_rl.training.anchors import anchor_groups
from buleyean_rl.training.processes import ALONE
from buleyean_rl.training.trainer import Anchors
from tiny import tiny_llama
from tiny_trainer import RECORDS, trainer


def accepted(first: int, tokens: int = 3) -> Boundary:
    return merge_responses([first], [(list(range(50, 50 + tokens)), [True] * tokens)], [0], [1])


def rejected(*answers: list[int]) -> Boundary:
    return merge_responses(
        [5, 6], [(ids, [True] * len(ids)) for ids in answers], [1] * len(answers), [1] * len(answers)
    )


@pytest.fixture
def model(base: Path, tmp_path: Path, use_cache: Callable[[Path], None]) -> Model:
    use_cache(tmp_path / "cache")
    return open_model(str(base))


def make_groups(model: Model, folder: Path, boundaries: list[Boundary], **settings: Any) -> list[Any]:
    write_boundaries(folder / "records.arrow", [boundaries])
    file = BoundaryFile(folder / "records.arrow")
    rejects = file.rejected_answers > 0
    dataset: Any = SimpleNamespace(
        training=file.select(np.flatnonzero(rejects)), anchors=file.select(np.flatnonzero(~rejects))
    )
    config: Any = SimpleNamespace(
        **({"anchors": 2, "loss": Objective(), "max_length": 64, "seed": 0, "processes": ALONE} | settings)
    )
    return anchor_groups(model, dataset, config)


def test_accepted_answers_and_passages_are_anchors(model: Model, tmp_path: Path) -> None:
    boundaries = [rejected([20]), accepted(7), accepted(8)]
    passages, answers = make_groups(model, tmp_path, boundaries)
    assert sorted(anchor.prompt for anchor in answers) == [[7], [8]]
    assert all(anchor.rejected_answers == 0 for anchor in (*answers, *passages))
    assert all(anchor.size <= 64 for anchor in passages)
    assert make_groups(model, tmp_path, boundaries, anchors=1) == [passages]  # where there is one, a passage


def test_without_an_accepted_answer_the_base_answers_but_what_was_rejected(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = model.tokenizer.eos_token_id
    monkeypatch.setattr(module, "own_continuations", lambda *_: [[20, 21, end], [30], [end]])
    monkeypatch.setattr(module, "own_passages", lambda *_: [[1, 2]])
    boundaries = [rejected([20, 21, 22]), rejected([20, 21, 22]), rejected([40])]
    _, answers = make_groups(model, tmp_path, boundaries)
    assert [(anchor.prompt, anchor.tokens) for anchor in answers] == [([5, 6], [30])]


@pytest.mark.parametrize(
    "settings", [{"anchors": 0}, {"loss": Objective("published")}, {"loss": Objective("listwise")}], ids=str
)
def test_what_has_no_anchors(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert make_groups(model, tmp_path, [rejected([20]), accepted(7)], **settings) == []


def test_groups_take_turns_and_begin_again() -> None:
    answers, passages = [accepted(7), accepted(8), accepted(9)], [accepted(1)]
    row = Anchors(10, [answers, [], passages]).take(0, 8)
    assert [number for number, _ in row] == [10, 13, 11, 13, 12, 13, 10, 13]
    assert [boundary.prompt for _, boundary in row[:4]] == [[7], [1], [8], [1]]
    assert Anchors(10, [answers, [], passages]).take(3, 4) == row[3:7]


def test_a_step_is_a_mean_over_rejected_answers_and_one_over_its_anchors(tmp_path: Path) -> None:
    """Also where its records come in several batches; measured as the step of plain gradient descent."""
    records, texts = RECORDS[:4], [accepted(7, 8), accepted(8, 2), accepted(9, 5)]
    results = []
    for size, accumulated in ((4, 1), (2, 2)):
        module = adapted(lambda: tiny_llama(TOKENIZER))
        run = trainer(
            module,
            tmp_path,
            records,
            anchors=[texts],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            **{"max_steps": 1, "warmup_steps": 0, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0},
        )
        run.train()
        results.append(torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    run = trainer(stir(adapted(lambda: tiny_llama(TOKENIZER))), tmp_path, records, anchors=[texts])
    batches = run.collate([*enumerate(records), *Anchors(len(records), [texts]).take(0, 8)])["batches"]
    weights = {True: 0.0, False: 0.0}
    for batch in batches:
        assert batch.weights is not None
        numbers = torch.tensor(batch.numbers)[batch.record]
        for is_anchor in weights:
            weights[is_anchor] += batch.weights[(numbers >= len(records)) == is_anchor].sum().item()
    assert weights[False] == pytest.approx(2 * len(records))  # two answers are rejected in each
    assert weights[True] == pytest.approx(ANCHOR_SHARE * weights[False])


def test_only_accepted_answers_were_judged(model: Model, tmp_path: Path) -> None:
    passages, answers = make_groups(model, tmp_path, [rejected([20]), accepted(7)])
    assert [(j.rejected, j.judged) for anchor in answers for j in anchor.judgements] == [(0, 1)] * 3
    assert not any(anchor.judgements for anchor in passages)
