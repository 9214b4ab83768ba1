"""How firm a rejection is: whose answers were rejected, in how many rounds, and how many were accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from buleyean_rl.data.token_store import BoundaryFile, write_boundaries
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.errors import UsageError
from buleyean_rl.models.model import open_model
from buleyean_rl.objectives.complement import Prior, ratios
from buleyean_rl.training import firmness
from buleyean_rl.training.config import load_config
from buleyean_rl.training.firmness import (
    Likelihood,
    decide_firmness,
    own_tau,
    rejected_likelihood,
    set_own_steps,
    spread,
)

OWN, FOREIGN = Likelihood(0.5, 1.5), Likelihood(1.9, 1.8)


def judged(*answers: tuple[list[int], int, int]) -> Boundary:
    texts, counts, rounds = zip(*answers, strict=True)
    return merge_responses([5, 6], [(ids, [True] * len(ids)) for ids in texts], counts, rounds)


def stored(path: Path, boundaries: Sequence[Boundary]) -> BoundaryFile:
    write_boundaries(path, [boundaries])
    return BoundaryFile(path)


def decide(
    monkeypatch: pytest.MonkeyPatch,
    likelihood: Likelihood,
    folder: Path,
    *boundaries: Boundary,
    drawn: int = 0,
    **settings: Any,
) -> tuple[Any, str | None]:
    monkeypatch.setattr(firmness, "rejected_likelihood", lambda *_: likelihood)
    training, anchors = stored(folder / "training", boundaries), stored(folder / "anchors", [judged(([9], 0, 1))] * 3)
    dataset: Any = SimpleNamespace(
        training=training, held_out=training.select(np.arange(0)), anchors=anchors, counts={"drawn_ids": drawn}
    )
    config = load_config(None, folder / "run", settings)
    line = decide_firmness(None, dataset, config)  # type: ignore[arg-type]
    return config.loss, line


@pytest.mark.parametrize("rounds", [1, 3, 60])
def test_the_models_own_answers_lose_the_same_odds_in_however_many_rounds(
    rounds: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss, line = decide(monkeypatch, OWN, tmp_path, judged(([7, 8], rounds, rounds)))
    n = torch.tensor(float(rounds), dtype=torch.float64)
    assert ratios(n, n, loss.tau, loss.prior).item() == pytest.approx(1 / 61)
    assert line is not None
    assert "the model's own (0.50 nats per token, 1.50 expected)" in line
    assert "divides a token's odds by 61" in line


def test_answers_of_others_have_the_published_weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loss, line = decide(monkeypatch, FOREIGN, tmp_path, judged(([7, 8], 1, 1)), prior_mean=None)
    assert (loss.tau, loss.prior) == (1.0, Prior())
    assert line is not None
    assert "would not give itself" in line
    assert "divides a token's odds by 2 (tau 1)" in line


def test_answers_whose_tokens_were_drawn_are_the_models_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loss, _ = decide(monkeypatch, FOREIGN, tmp_path, judged(([7, 8], 1, 1)), drawn=4)
    assert loss.tau == own_tau(1)


def test_settings_overrule_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loss, line = decide(
        monkeypatch, OWN, tmp_path, judged(([7], 1, 1)), tau=2.0, prior_mean=0.25, prior_rounds=4.0, preset="loops"
    )
    assert (loss.tau, loss.prior) == (2.0, Prior(0.25, 4.0))
    assert line is None
    assert decide(monkeypatch, OWN, tmp_path, judged(([7], 1, 1)), objective="listwise")[0].tau == 1.0


def test_the_share_accepted_is_that_of_the_whole_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loss, line = decide(monkeypatch, OWN, tmp_path, judged(([7], 2, 4), ([8], 1, 1)), prior_mean=None)
    assert loss.prior == Prior(5 / 8)  # 2 of 5, and 3 of 3 of the answers that only anchor
    assert line is not None
    assert "62% accepted" in line


@pytest.mark.parametrize(
    ("records", "settings", "steps"),
    [
        (2, {}, (2.25e-4, 3, 2)),
        (2, {"preset": "few"}, (2.25e-4, 3, 4)),
        (8, {}, (4.5e-4, 3, 2)),
        (100, {}, (4.5e-4, 1.5, 2)),
        (300, {}, (0.034 / 150, 1, 2)),
        (100, {"num_train_epochs": 4.0}, (1.7e-4, 4, 2)),
        (100, {"learning_rate": 1e-3}, (1e-3, 1.5, 2)),
        (300, {"max_steps": 1000}, (3.4e-5, 1, 2)),
    ],
)
def test_own_answers_go_as_far_however_many_there_are(
    records: int, settings: dict[str, Any], steps: tuple[float, float, int], tmp_path: Path
) -> None:
    config = load_config(None, tmp_path / "run", settings)
    set_own_steps(config, records)
    assert (config.learning_rate, config.num_train_epochs, config.per_device_train_batch_size) == pytest.approx(steps)


def test_only_own_answers_have_other_steps_and_only_where_they_are_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_for: list[int] = []
    monkeypatch.setattr(firmness, "set_own_steps", lambda _, records: set_for.append(records))
    for likelihood, settings in ((OWN, {"preset": "loops"}), (FOREIGN, {}), (OWN, {})):
        decide(monkeypatch, likelihood, tmp_path, judged(([7], 1, 1)), **settings)
    assert set_for == [1]


def test_own_tau_by_hand() -> None:
    assert own_tau(1) == pytest.approx(math.log2(61))
    assert own_tau(60) == pytest.approx(1)
    assert own_tau(4, prior_rounds=4) == pytest.approx(math.log2(61))


def test_records_are_looked_at_from_first_to_last() -> None:
    boundaries = [judged(([token], 1, 1)) for token in range(10)]
    assert [b.tokens for b in spread(boundaries, 4)] == [[0], [2], [5], [7]]
    assert spread(boundaries, 20) == boundaries


def test_the_likelihood_is_the_bases_over_a_rejected_answer_alone(
    base: Path, tmp_path: Path, use_cache: Callable[[Path], None]
) -> None:
    use_cache(tmp_path / "cache")
    model = open_model(str(base))
    answers = [([7, 8, 9], 1, 1), ([10], 0, 1)], [([11], 1, 1)]
    nats, entropy = rejected_likelihood(model, [judged(*each) for each in answers])
    logs = [
        model.plain(torch.tensor([[5, 6, *ids]])).logits[0, 1:-1].float().log_softmax(-1) for ids in ([7, 8, 9], [11])
    ]
    log_p = torch.cat(logs)
    assert nats == pytest.approx(-log_p[range(4), [7, 8, 9, 11]].mean().item(), rel=1e-3)
    assert entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-3)


def test_a_tau_whose_targets_no_float_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"tau": 20.0, "preset": "loops"}
    assert decide(monkeypatch, OWN, tmp_path, judged(([7], 1, 1)), **settings)[0].tau == 20
    with pytest.raises(UsageError, match=r"at most 11\.5 works"):
        decide(monkeypatch, OWN, tmp_path, judged(([7], 1, 1)), prior_rounds=0.001, **settings)
