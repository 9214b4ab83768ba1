"""The dense losses by hand arithmetic, and what an objective may be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buleyean_rl.errors import UsageError
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import (
    NodeLosses,
    Objective,
    complement_loss,
    listwise_loss,
    published_loss,
    ratio_loss,
)

LN2, LN3 = math.log(2), math.log(3)


def log(*probabilities: float) -> Tensor:
    """Logits of one node."""
    return torch.tensor([probabilities], dtype=torch.double).log()


def counts(v: dict[int, int], rounds: int) -> Counts:
    """Rejections at one node."""
    return Counts(
        torch.zeros(len(v), dtype=torch.long),
        torch.tensor(list(v), dtype=torch.long),
        torch.tensor(list(v.values())).double(),
        torch.tensor([rounds]).double(),
    )


def values(losses: NodeLosses) -> dict[str, float]:
    return {name: part.item() for name, part in losses._asdict().items()}


def test_published_by_hand() -> None:
    """T = 1, v = (1, 0): w = (1, 2), P = (1/3, 2/3), a = (1, 0); pi is even."""
    got = values(published_loss(log(1 / 2, 1 / 2), counts({0: 1}, 1), Objective("published")))
    kl = 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3)  # 0.0566
    q = (0.7 / 3 + 0.3, 1.4 / 3)  # alpha P + (1 - alpha) a, here of sum 1, is the optimum
    floor = -q[0] * math.log(q[0]) - q[1] * math.log(q[1]) - 0.7 * (LN3 - 2 / 3 * LN2)
    assert got == pytest.approx({"kl": kl, "contrast": LN2, "loss": 0.7 * kl + 0.3 * LN2, "floor": floor})
    assert (got["loss"], got["floor"]) == pytest.approx((0.247587, 0.245363), abs=1e-6)


def test_published_with_graded_counts_by_hand() -> None:
    """T = 4, v = (3, 1, 0): w = (2, 4, 5), P = (2, 4, 5)/11, a = (3/4, 1/4, 0)."""
    got = values(published_loss(log(1 / 2, 1 / 4, 1 / 4), counts({0: 3, 1: 1}, 4), Objective("published", alpha=0.5)))
    kl = (2 * math.log(4 / 11) + 4 * math.log(16 / 11) + 5 * math.log(20 / 11)) / 11
    contrast = 3 / 4 * LN2 + 1 / 4 * 2 * LN2
    assert (got["kl"], got["contrast"]) == pytest.approx((kl, contrast))
    assert got["loss"] == pytest.approx((kl + contrast) / 2)


def test_complement_by_hand() -> None:
    """T = 3, v = (3, 0, 1) on a base (2, 1, 1)/4: w = (1, 4, 3), P = (2, 4, 3)/9, a = (1, 0, 1/3)."""
    rejections = counts({0: 3, 2: 1}, 3)
    got = values(complement_loss(log(1 / 4, 1 / 4, 1 / 2), log(1 / 2, 1 / 4, 1 / 4), rejections, Objective()))
    kl = (2 * math.log(8 / 9) + 4 * math.log(16 / 9) + 3 * math.log(6 / 9)) / 9
    contrast = -math.log(3 / 4) - 1 / 3 * math.log(1 / 2)
    assert (got["kl"], got["contrast"]) == pytest.approx((kl, contrast))
    assert got["loss"] == pytest.approx(0.7 * kl + 0.3 * contrast)


def test_complement_floor_by_hand() -> None:
    """Two tokens, even base, v = T = 1: P = (1/3, 2/3), and pi* solves 0.7 (pi - 1/3) = -0.3 pi."""
    got = values(complement_loss(log(1 / 2, 1 / 2), log(1 / 2, 1 / 2), counts({0: 1}, 1), Objective()))
    best = 0.7 / 3  # derivative of 0.7 KL is 0.7 (pi - P) / (pi (1 - pi)), of the contrast 0.3 / (1 - pi)
    kl = 1 / 3 * math.log(1 / 3 / best) + 2 / 3 * math.log(2 / 3 / (1 - best))
    assert got["floor"] == pytest.approx(0.7 * kl - 0.3 * math.log(1 - best))


def test_ratio_by_hand() -> None:
    """As above: the first token is above its target, 1/4 against 2/9; the third too, 1/2 against 3/9."""
    rejections = counts({0: 3, 2: 1}, 3)
    pi, base = log(1 / 4, 1 / 4, 1 / 2), log(1 / 2, 1 / 4, 1 / 4)
    got = values(ratio_loss(pi, base, rejections, Objective("ratio")))
    kl = (2 * math.log(8 / 9) + 4 * math.log(16 / 9) + 3 * math.log(6 / 9)) / 9
    contrast = math.log(9 / 8) ** 2 / 2 + 1 / 3 * math.log(3 / 2) ** 2 / 2
    assert got == pytest.approx({"kl": kl, "contrast": contrast, "loss": 0.7 * kl + 0.3 * contrast, "floor": 0})


def test_ratio_comes_to_rest_at_the_target() -> None:
    """And a token that is below its target already has no contrast: T = v = 1 on an even base, P = (1/3, 2/3)."""
    even = log(1 / 2, 1 / 2)
    there = values(ratio_loss(log(1 / 3, 2 / 3), even, counts({0: 1}, 1), Objective("ratio")))
    assert there == pytest.approx(dict.fromkeys(there, 0), abs=1e-15)
    below = values(ratio_loss(log(1 / 4, 3 / 4), even, counts({0: 1}, 1), Objective("ratio")))
    assert below["contrast"] == 0
    assert below["kl"] > 0


def test_strength_by_hand() -> None:
    """tau = 2 squares the weights: T = 1, v = (1, 0) gives (1, 4), P = (1/5, 4/5)."""
    at_target = log(1 / 5, 4 / 5)
    rejected = counts({0: 1}, 1)
    assert published_loss(at_target, rejected, Objective("published", tau=2)).kl.item() == pytest.approx(0, abs=1e-15)
    even = log(1 / 2, 1 / 2)
    assert complement_loss(at_target, even, rejected, Objective(tau=2)).kl.item() == pytest.approx(0, abs=1e-15)


def test_a_node_without_rejections_anchors_to_the_base() -> None:
    """There P is the base itself: the loss is alpha KL(base || pi), and 0 at the base."""
    base, pi = log(1 / 2, 1 / 4, 1 / 4), log(1 / 4, 1 / 4, 1 / 2)
    there = values(complement_loss(base, base, counts({}, 5), Objective()))
    assert there == pytest.approx(dict.fromkeys(there, 0), abs=1e-15)
    away = values(complement_loss(pi, base, counts({}, 5), Objective()))
    assert away == pytest.approx({"loss": 0.7 * LN2 / 4, "kl": LN2 / 4, "contrast": 0, "floor": 0})


def test_a_certain_rejected_token_has_a_finite_loss() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    losses = complement_loss(logits, log(0.5, 0.5).float(), counts({0: 1}, 1).astype(torch.float32), Objective())
    losses.loss.sum().backward()
    assert losses.loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_one_step_makes_the_rejected_token_unlikelier_only_with_complement() -> None:
    """The published contrast pulls towards what was rejected: the gradient's sign says so."""
    rejected = counts({0: 1}, 1)
    even = log(0.25, 0.25, 0.25, 0.25)
    for name, sign in (("complement", 1), ("published", -1)):
        logits = even.clone().requires_grad_()
        objective = Objective(name)  # type: ignore[arg-type]
        if objective.uses_reference:
            complement_loss(logits, even, rejected, objective).loss.sum().backward()
        else:
            published_loss(logits, rejected, objective).loss.sum().backward()
        assert logits.grad is not None
        assert logits.grad[0, 0].sign() == sign


@given(p=st.floats(1e-6, 1 - 1e-6), alpha=st.floats(0.05, 1), tau=st.floats(0.1, 8), v=st.integers(1, 9))
def test_complement_pushes_a_token_no_harder_than_the_base_expects_it(
    p: float, alpha: float, tau: float, v: int
) -> None:
    """The gradient in the logit of a rejected token, at pi = pi_base, as docs/theory.md has it."""
    base = log(p, 1 - p)
    logits = base.clone().requires_grad_()
    complement_loss(logits, base, counts({0: v}, 9), Objective(alpha=alpha, tau=tau)).loss.sum().backward()
    assert logits.grad is not None
    r = ((9 - v + 1) / 10) ** tau
    push = alpha * p * (1 - r) * (1 - p) / (1 - p * (1 - r)) + (1 - alpha) * v / 9 * p
    assert logits.grad[0, 0].item() == pytest.approx(push, rel=1e-6, abs=1e-9)
    assert 0 < push <= p


@given(p=st.floats(1e-6, 1 - 1e-6), alpha=st.floats(0.05, 1), tau=st.floats(0.1, 8), v=st.integers(1, 9))
def test_ratio_pushes_an_unlikely_token_as_hard_as_another(p: float, alpha: float, tau: float, v: int) -> None:
    """The gradient in the logit of a rejected token, at pi = pi_base, as docs/theory.md has it."""
    base = log(p, 1 - p)
    logits = base.clone().requires_grad_()
    ratio_loss(logits, base, counts({0: v}, 9), Objective("ratio", alpha, tau)).loss.sum().backward()
    assert logits.grad is not None
    r = ((9 - v + 1) / 10) ** tau
    excess = math.log(1 - p * (1 - r)) - math.log(r)
    push = alpha * p * (1 - r) * (1 - p) / (1 - p * (1 - r)) + (1 - alpha) * v / 9 * excess * (1 - p)
    assert logits.grad[0, 0].item() == pytest.approx(push, rel=1e-6, abs=1e-9)


@given(
    st.integers(0, 999), st.sampled_from(["complement", "ratio", "published"]), st.floats(0.05, 1), st.floats(0.2, 3)
)
def test_no_loss_is_below_its_floor(seed: int, name: str, alpha: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, base = 3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.double)
    v = torch.randint(-3, 6, (5, 7), generator=generator).clamp_min(0)
    node, option = v.nonzero(as_tuple=True)
    rejections = Counts(node, option, v[node, option].double(), torch.full((5,), 4.0).double())
    objective = Objective(name, alpha, tau)  # type: ignore[arg-type]
    if name == "published":
        losses = published_loss(logits, rejections, objective)
    else:
        losses = {"complement": complement_loss, "ratio": ratio_loss}[name](logits, base, rejections, objective)
    assert (losses.loss >= losses.floor - 1e-12).all()
    assert (losses.kl >= -1e-12).all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "dpo"}, "unknown objective 'dpo': choose one of complement, ratio, published, listwise"),
        ({"alpha": 0.0}, "alpha must be above 0 and at most 1, not 0.0"),
        ({"alpha": 1.5}, "alpha must be above 0 and at most 1, not 1.5"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"tau": 0.0}, "tau must be above 0 and finite, not 0.0"),
        ({"tau": math.nan}, "tau must be above 0"),
        ({"tau": math.inf}, "tau must be"),
    ],
)
def test_impossible_objectives_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Objective(**settings)  # type: ignore[arg-type]


def ranked(*records: tuple[list[int], int]) -> Counts:
    """The answers of some records: how often each was rejected, in how many rounds."""
    v = [float(count) for counts, _ in records for count in counts]
    node = [number for number, (counts, _) in enumerate(records) for _ in counts]
    rounds = torch.tensor([float(rounds) for _, rounds in records]).double()
    return Counts(torch.tensor(node), torch.arange(len(v)), torch.tensor(v).double(), rounds)


def test_listwise_by_hand() -> None:
    """T = 2, v = (2, 0): w = (1, 3), P = (1/4, 3/4), a = (1, 0). With log-ratios (ln 3, 0) / beta, pi = (3/4, 1/4)."""
    ratios = torch.tensor([LN3, 0.0]).double() / 0.1
    got = values(listwise_loss(ratios, ranked(([2, 0], 2)), Objective("listwise")))
    kl = 1 / 4 * math.log(1 / 3) + 3 / 4 * LN3
    contrast = -math.log(1 / 4)
    assert (got["kl"], got["contrast"]) == pytest.approx((kl, contrast))
    assert got["loss"] == pytest.approx(0.7 * kl + 0.3 * contrast)


def test_listwise_of_several_records_is_that_of_each() -> None:
    records = [([3, 0, 1], 4), ([1, 0], 1), ([5, 5], 5)]
    ratios = torch.randn(7, generator=torch.Generator().manual_seed(0)).double() * 20
    together = listwise_loss(ratios, ranked(*records), Objective("listwise"))
    alone = [
        listwise_loss(part, ranked(r), Objective("listwise"))
        for part, r in zip(ratios.split([3, 2, 2]), records, strict=True)
    ]
    for name in NodeLosses._fields:
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))


@given(
    counts=st.lists(st.integers(0, 6), min_size=2, max_size=5),
    rounds=st.integers(1, 5),
    alpha=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_listwise_floor_is_reached_and_never_passed(counts: list[int], rounds: int, alpha: float, seed: int) -> None:
    objective, answers = Objective("listwise", alpha, beta=1.0), ranked((counts, rounds))
    ratios = 3 * torch.randn(len(counts), generator=torch.Generator().manual_seed(seed)).double()
    floor = listwise_loss(ratios, answers, objective).floor.item()
    assert listwise_loss(ratios, answers, objective).loss.item() >= floor - 1e-9
    ratios.requires_grad_()
    descent = torch.optim.LBFGS([ratios], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        loss = listwise_loss(ratios, answers, objective).loss.sum()
        loss.backward()
        return loss

    descent.step(closure)
    assert listwise_loss(ratios, answers, objective).loss.item() == pytest.approx(floor, abs=1e-5)
