"""The dense losses by hand arithmetic, their gradients, and what an objective may be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buleyean_rl.errors import UsageError
from buleyean_rl.objectives import complement
from buleyean_rl.objectives.complement import Counts, Prior
from buleyean_rl.objectives.losses import NodeLosses, Objective, complement_loss, listwise_loss, published_loss

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
        torch.full((len(v),), float(rounds), dtype=torch.double),
        1,
    )


def values(losses: NodeLosses) -> dict[str, float]:
    return {name: part.item() for name, part in losses._asdict().items()}


def gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss.sum(), inputs)
    return grad


def random_node(seed: int) -> tuple[Tensor, Tensor, Counts]:
    """Logits of a model and a reference at five nodes over seven tokens, and rejections."""
    generator = torch.Generator().manual_seed(seed)
    logits, base = 3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.double)
    v = torch.randint(-3, 6, (5, 7), generator=generator).clamp_min(0)
    node, option = v.nonzero(as_tuple=True)
    return logits, base, Counts(node, option, v[node, option].double(), torch.full(node.shape, 4.0).double(), 5)


# --- complement


def test_complement_by_hand() -> None:
    """T = 3, v = (3, 0, 1) on a base (2, 1, 1)/4: w = (1, 4, 3), P = (2, 4, 3)/9, c = (1, 0, 1/3).

    The first token is above its target, 1/4 against 2/9; the third too, 1/2 against 3/9.
    """
    rejections = counts({0: 3, 2: 1}, 3)
    got = values(complement_loss(log(1 / 4, 1 / 4, 1 / 2), log(1 / 2, 1 / 4, 1 / 4), rejections, Objective()))
    kl = (2 * math.log(8 / 9) + 4 * math.log(16 / 9) + 3 * math.log(6 / 9)) / 9
    contrast = math.log(9 / 8) ** 2 / 2 + 1 / 3 * math.log(3 / 2) ** 2 / 2
    assert got == pytest.approx({"kl": kl, "contrast": contrast, "loss": 0.9 * kl + 0.1 * contrast, "floor": 0})


def test_an_option_better_than_presumed_rises_and_comes_to_rest_there() -> None:
    """m = 1/4, k = 4: once rejected in three rounds is r = (2 + 1) / (7/4) = 12/7, though c = 1/3."""
    prior, even = Objective(prior=Prior(0.25, 4.0)), log(1 / 2, 1 / 2)
    logits = log(12 / 19, 7 / 19).requires_grad_()
    at_target = complement_loss(logits, even, counts({0: 1}, 3), prior)
    assert values(at_target) == pytest.approx(dict.fromkeys(NodeLosses._fields, 0), abs=1e-15)
    assert gradient(at_target.loss, logits)[0].tolist() == pytest.approx([0, 0], abs=1e-15)
    above = complement_loss(log(0.8, 0.2), even, counts({0: 1}, 3), prior)
    assert above.contrast.item() == pytest.approx(math.log(0.8 * 19 / 12) ** 2 / 6)
    capped = complement_loss(even, even, counts({0: 1}, 3), Objective(prior=Prior(0.25, 4.0, capped=True)))
    assert values(capped) == pytest.approx(dict.fromkeys(NodeLosses._fields, 0), abs=1e-15)


def test_complement_gradient_by_hand() -> None:
    """As above: x = (ln(9/8), 0, ln(3/2)/3), and equation (6)."""
    logits = log(1 / 4, 1 / 4, 1 / 2).requires_grad_()
    losses = complement_loss(logits, log(1 / 2, 1 / 4, 1 / 4), counts({0: 3, 2: 1}, 3), Objective())
    pi, P, x = (1 / 4, 1 / 4, 1 / 2), (2 / 9, 4 / 9, 3 / 9), (math.log(9 / 8), 0, math.log(3 / 2) / 3)
    expected = [0.9 * (pi[j] - P[j]) + 0.1 * (x[j] - pi[j] * sum(x)) for j in range(3)]
    assert gradient(losses.loss, logits)[0].tolist() == pytest.approx(expected)


def test_complement_comes_to_rest_at_the_target() -> None:
    """T = v = 1 on an even base, P = (1/3, 2/3); a token below its target has no contrast."""
    even, once = log(1 / 2, 1 / 2), counts({0: 1}, 1)
    logits = log(1 / 3, 2 / 3).requires_grad_()
    at_target = complement_loss(logits, even, once, Objective())
    assert values(at_target) == pytest.approx(dict.fromkeys(NodeLosses._fields, 0), abs=1e-15)
    assert gradient(at_target.loss, logits)[0].tolist() == pytest.approx([0, 0], abs=1e-15)
    below = values(complement_loss(log(1 / 4, 3 / 4), even, once, Objective()))
    assert below["contrast"] == 0
    assert below["kl"] > 0


def test_a_node_without_rejections_anchors_to_the_base() -> None:
    """There P is the base itself: the loss is alpha KL(base || pi), and 0 at the base."""
    base, pi = log(1 / 2, 1 / 4, 1 / 4), log(1 / 4, 1 / 4, 1 / 2)
    there = values(complement_loss(base, base, counts({}, 5), Objective()))
    assert there == pytest.approx(dict.fromkeys(there, 0), abs=1e-15)
    away = values(complement_loss(pi, base, counts({}, 5), Objective()))
    assert away == pytest.approx({"loss": 0.9 * LN2 / 4, "kl": LN2 / 4, "contrast": 0, "floor": 0})


def test_a_certain_rejected_token_has_a_finite_loss() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    losses = complement_loss(logits, log(0.5, 0.5).float(), counts({0: 1}, 1).astype(torch.float32), Objective())
    assert losses.loss.isfinite().all()
    assert gradient(losses.loss, logits).isfinite().all()


@given(p=st.floats(1e-6, 0.99), alpha=st.floats(0.05, 1), tau=st.floats(0.1, 8), v=st.integers(1, 9))
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_complement_pushes_an_unlikely_token_too(min_p: float, p: float, alpha: float, tau: float, v: int) -> None:
    """The gradient in the logit of a rejected token, at pi = pi_base, as docs/theory.md states it."""
    tail = (1 - p) / 20
    base = log(p, 1 - p - tail, tail)
    logits = base.clone().requires_grad_()
    losses = complement_loss(logits, base, counts({0: v}, 9), Objective(alpha=alpha, tau=tau, min_p=min_p))
    r, share = ((9 - v + 1) / 10) ** tau, p / (1 - tail if min_p else 1)
    Z = 1 - share * (1 - r)
    push = alpha * p * (1 - r) * (1 - share) / Z + (1 - alpha) * v / 9 * (1 - p) * math.log(Z / r)
    assert gradient(losses.loss, logits)[0, 0].item() == pytest.approx(push, rel=1e-6, abs=1e-9)


# --- published


def test_published_by_hand() -> None:
    """T = 1, v = (1, 0): w = (1, 2), P = (1/3, 2/3), c = (1, 0); pi is even."""
    got = values(published_loss(log(1 / 2, 1 / 2), counts({0: 1}, 1), Objective("published")))
    kl = 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3)  # 0.0566
    q = (0.7 / 3 + 0.3, 1.4 / 3)  # alpha P + (1 - alpha) c, here of sum 1, is the optimum
    floor = -q[0] * math.log(q[0]) - q[1] * math.log(q[1]) - 0.7 * (LN3 - 2 / 3 * LN2)
    assert got == pytest.approx({"kl": kl, "contrast": LN2, "loss": 0.7 * kl + 0.3 * LN2, "floor": floor})
    assert (got["loss"], got["floor"]) == pytest.approx((0.247587, 0.245363), abs=1e-6)


def test_published_with_graded_counts_by_hand() -> None:
    """T = 4, v = (3, 1, 0): w = (2, 4, 5), P = (2, 4, 5)/11, c = (3/4, 1/4, 0)."""
    got = values(published_loss(log(1 / 2, 1 / 4, 1 / 4), counts({0: 3, 1: 1}, 4), Objective("published", alpha=0.5)))
    kl = (2 * math.log(4 / 11) + 4 * math.log(16 / 11) + 5 * math.log(20 / 11)) / 11
    contrast = 3 / 4 * LN2 + 1 / 4 * 2 * LN2
    assert (got["kl"], got["contrast"]) == pytest.approx((kl, contrast))
    assert got["loss"] == pytest.approx((kl + contrast) / 2)


# --- both


def test_tau_by_hand() -> None:
    """tau = 2 squares the weights: T = 1, v = (1, 0) gives (1, 4), P = (1/5, 4/5)."""
    at_target, once = log(1 / 5, 4 / 5), counts({0: 1}, 1)
    assert published_loss(at_target, once, Objective("published", tau=2)).kl.item() == pytest.approx(0, abs=1e-15)
    losses = complement_loss(at_target, log(1 / 2, 1 / 2), once, Objective(tau=2))
    assert losses.loss.item() == pytest.approx(0, abs=1e-15)


def test_one_step_makes_the_rejected_token_unlikelier_only_with_complement() -> None:
    """The published contrast pulls towards rejected tokens: the gradient's sign says so."""
    rejected, even = counts({0: 1}, 1), log(0.25, 0.25, 0.25, 0.25)
    logits = even.clone().requires_grad_()
    assert gradient(complement_loss(logits, even, rejected, Objective()).loss, logits)[0, 0] > 0
    assert gradient(published_loss(logits, rejected, Objective("published")).loss, logits)[0, 0] < 0


priors = st.builds(Prior, st.floats(0.1, 1), st.floats(0.1, 5), st.booleans())
min_ps = st.sampled_from([0.0, 0.05, 0.5, 1.0])


@given(
    st.integers(0, 999),
    st.sampled_from(["complement", "published"]),
    st.floats(0.05, 1),
    st.floats(0.2, 3),
    priors,
    min_ps,
)
def test_no_loss_is_below_its_floor(seed: int, name: str, alpha: float, tau: float, prior: Prior, min_p: float) -> None:
    logits, base, rejections = random_node(seed)
    if name == "published":
        losses = published_loss(logits, rejections, Objective("published", alpha, tau, prior=prior))
    else:
        losses = complement_loss(logits, base, rejections, Objective("complement", alpha, tau, 0.1, prior, min_p))
    assert (losses.loss >= losses.floor - 1e-12).all()
    assert (losses.kl >= -1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    logits, base, rejections = random_node(seed)
    logits.requires_grad_()
    for loss in (
        lambda z: complement_loss(z, base, rejections, Objective(alpha=0.3, tau=0.5, min_p=0.0)).loss,
        lambda z: published_loss(z, rejections, Objective("published", tau=2.0)).loss,
        lambda z: complement_loss(z, base, rejections, Objective(prior=Prior(0.5, 2.0), min_p=0.2)).loss,
    ):
        assert torch.autograd.gradcheck(loss, logits)


@given(st.integers(0, 999), st.floats(0.05, 1), st.floats(0.2, 3), priors, min_ps)
def test_complement_has_no_stationary_point_but_its_target(
    seed: int, alpha: float, tau: float, prior: Prior, min_p: float
) -> None:
    """The token furthest below its target is raised in proportion to what it lacks, as docs/theory.md proves."""
    logits, base, rejections = random_node(seed)
    logits.requires_grad_()
    objective = Objective(alpha=alpha, tau=tau, prior=prior, min_p=min_p)
    grad = gradient(complement_loss(logits, base, rejections, objective).loss, logits)
    v, n = rejections.dense(rejections.count, 7), rejections.dense(rejections.rounds, 7)
    P = complement.target(v, n, base.softmax(-1), tau, prior, min_p)
    at_target = complement_loss(P.log(), base, rejections, objective)
    torch.testing.assert_close(at_target.loss, torch.zeros(5).double(), rtol=0, atol=1e-12)
    deficit = (P - logits.detach().softmax(-1)).amax(-1)
    assert (deficit > 0).all()
    assert (grad.amin(-1) <= -alpha * deficit + 1e-12).all()


# --- listwise


def ranked(*records: tuple[list[int], int]) -> Counts:
    """The answers of some records: how often each was rejected, in how many rounds."""
    v = [float(count) for counts, _ in records for count in counts]
    node = [number for number, (counts, _) in enumerate(records) for _ in counts]
    rounds = torch.tensor([float(rounds) for counts, rounds in records for _ in counts]).double()
    return Counts(torch.tensor(node), torch.arange(len(v)), torch.tensor(v).double(), rounds, len(records))


def test_listwise_by_hand() -> None:
    """T = 2, v = (2, 0): w = (1, 3), P = (1/4, 3/4), c = (1, 0). With log-ratios (ln 3, 0) / beta, pi = (3/4, 1/4)."""
    ratios = torch.tensor([LN3, 0.0]).double() / 0.1
    got = values(listwise_loss(ratios, ranked(([2, 0], 2)), Objective("listwise")))
    kl = 1 / 4 * math.log(1 / 3) + 3 / 4 * LN3
    contrast = LN3**2 / 2  # log pi - log P = ln 3
    assert got == pytest.approx({"kl": kl, "contrast": contrast, "loss": 0.7 * kl + 0.3 * contrast, "floor": 0})


def test_listwise_gradient_by_hand() -> None:
    """As above: x = (ln 3, 0), dL/ds = 0.7 (pi - P) + 0.3 (x - pi ln 3), and s is beta times the log-ratio."""
    ratios = (torch.tensor([LN3, 0.0]).double() / 0.1).requires_grad_()
    losses = listwise_loss(ratios, ranked(([2, 0], 2)), Objective("listwise"))
    slope = 0.7 * (3 / 4 - 1 / 4) + 0.3 * (LN3 - 3 / 4 * LN3)
    assert gradient(losses.loss, ratios).tolist() == pytest.approx([0.1 * slope, -0.1 * slope])


def test_an_answer_below_its_target_has_no_listwise_contrast() -> None:
    """T = 2, v = (2, 1, 0): P = (1, 2, 3)/6; pi = (1, 4, 1)/6: the second, at twice its target, has c = 1/2."""
    ratios = torch.tensor([0.0, math.log(4), 0.0]).double()
    got = values(listwise_loss(ratios, ranked(([2, 1, 0], 2)), Objective("listwise", beta=1.0)))
    assert got["contrast"] == pytest.approx(1 / 2 * LN2**2 / 2)


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
    tau=st.floats(0.2, 3),
    seed=st.integers(0, 99),
)
def test_listwise_is_zero_with_zero_gradient_at_its_target(
    counts: list[int], rounds: int, alpha: float, tau: float, seed: int
) -> None:
    """Whatever constant is added to the log-ratios; and nowhere below."""
    prior = Prior(0.5, 2.0)
    objective, answers = Objective("listwise", alpha, tau, 0.5, prior), ranked((counts, rounds))
    P = complement.target(torch.tensor(counts).double(), torch.tensor(float(rounds)), tau=tau, prior=prior)
    ratios = (P.log() / 0.5 + seed).requires_grad_()
    losses = listwise_loss(ratios, answers, objective)
    assert values(losses) == pytest.approx(dict.fromkeys(NodeLosses._fields, 0), abs=1e-12)
    torch.testing.assert_close(gradient(losses.loss, ratios), torch.zeros_like(ratios), rtol=0, atol=1e-12)
    away = ratios.detach() + torch.randn(len(counts), generator=torch.Generator().manual_seed(seed)).double()
    assert listwise_loss(away, answers, objective).loss.item() >= 0


@pytest.mark.parametrize("seed", range(3))
def test_the_listwise_gradient_is_that_of_finite_differences(seed: int) -> None:
    answers = ranked(([3, 0, 1], 4), ([1, 0], 1), ([5, 5], 5))
    ratios = 5 * torch.randn(7, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: listwise_loss(r, answers, Objective("listwise", 0.4, 0.5)).loss, ratios)


# --- what an objective may be


def test_each_objective_has_its_own_alpha_and_min_p() -> None:
    assert Objective() == Objective("complement", 0.9, 1.0, 0.1, min_p=0.1)
    assert Objective("listwise") == Objective("listwise", alpha=0.7, min_p=0.0)
    assert Objective("published") == Objective("published", alpha=0.7, min_p=0.0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "dpo"}, "unknown objective 'dpo': choose one of complement, listwise, published"),
        ({"name": "ratio"}, "objective 'ratio' is called 'complement' now"),
        ({"alpha": 0.0}, "alpha must be above 0 and at most 1, not 0.0"),
        ({"alpha": 1.5}, "alpha must be above 0 and at most 1, not 1.5"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"tau": 0.0}, "tau must be above 0 and finite, not 0.0"),
        ({"tau": math.nan}, "tau must be above 0"),
        ({"tau": math.inf}, "tau must be"),
        ({"beta": 0.0}, "beta must be above 0 and finite, not 0.0"),
        (
            {"tau": 50.0, "prior": Prior(0.1)},
            "tau 50 is too large for a prior mean of 0.1: lower tau or raise the mean",
        ),
        ({"min_p": -0.1}, "min_p must be at least 0 and at most 1, not -0.1"),
        ({"min_p": math.nan}, "min_p must be"),
        (
            {"name": "listwise", "min_p": 0.1},
            "min_p is about a reference model over tokens: leave it out with listwise",
        ),
    ],
)
def test_impossible_objectives_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Objective(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prior", "problem"),
    [
        ((0.0,), "the prior mean must be above 0 and at most 1, not 0.0"),
        ((1.5,), "the prior mean must be"),
        ((math.nan,), "the prior mean must be"),
        ((1.0, 0.0), "the prior rounds must be above 0 and finite, not 0.0"),
        ((1.0, math.inf), "the prior rounds must be"),
    ],
)
def test_impossible_priors_are_refused(prior: tuple[float, ...], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Prior(*prior)
