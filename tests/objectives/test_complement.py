"""The complement distribution: exact arithmetic, its axioms, and a floor that no distribution is below."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buleyean_rl.objectives import complement
from buleyean_rl.objectives.complement import PUBLISHED, Counts, Prior, exact_target, published_floor, share_accepted

Table = list[list[int]]  # v of every option at every node

CASES: dict[str, tuple[Table, int]] = {
    "one rejection": ([[1, 0, 0, 0]], 1),
    "graded": ([[3, 1, 0, 0, 0]], 4),
    "nothing rejected": ([[0, 0, 0]], 7),
    "everything rejected": ([[2, 1, 3]], 3),
    "everything rejected always": ([[9, 9]], 9),
    "beyond T": ([[12, 1, 0]], 10),
    "several nodes": ([[1, 0, 2, 0], [0, 0, 0, 0], [2, 2, 2, 2]], 2),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, int]:
    options = draw(st.integers(2, 6))
    row = st.lists(st.integers(0, 9), min_size=options, max_size=options)
    return draw(st.lists(row, min_size=1, max_size=4)), draw(st.integers(1, 8))


def sparse(table: Table, rounds: int) -> Counts:
    entries = [(node, i, v) for node, row in enumerate(table) for i, v in enumerate(row) if v]
    node, option, count = torch.tensor(entries, dtype=torch.long).reshape(-1, 3).T.contiguous()
    return Counts(node, option, count.double(), torch.full(count.shape, float(rounds), dtype=torch.double), len(table))


def dense(table: Table, rounds: int, base: Tensor | None = None, tau: float = 1.0, prior: Prior = PUBLISHED) -> Tensor:
    return complement.target(torch.tensor(table).double(), torch.tensor(float(rounds)).double(), base, tau, prior)


def random_distributions(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.double)).softmax(-1)


def published(log_pi: Tensor, target: Tensor, counts: Counts, alpha: float) -> Tensor:
    """The published objective at every node by its definition, from log-probabilities."""
    rate = counts.dense(counts.rate, target.shape[-1])
    kl = (torch.xlogy(target, target) - target * log_pi).sum(-1)
    return alpha * kl - (1 - alpha) * (rate * log_pi).sum(-1)


def least_published(target: Tensor, counts: Counts, alpha: float) -> Tensor:
    """The floor by brute force: gradient descent on logits, all nodes at once."""
    logits = target.log().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        search.zero_grad()
        total = published(logits.log_softmax(-1), target, counts, alpha).sum()
        total.backward()
        return total

    search.step(step)
    return published(logits.log_softmax(-1), target, counts, alpha).detach()


# --- the target


def test_target_by_hand() -> None:
    assert exact_target([0, 1, 3], 3) == [Fraction(4, 8), Fraction(3, 8), Fraction(1, 8)]
    assert exact_target([1, 0], 1, base=[3, 1]) == [Fraction(3, 5), Fraction(2, 5)]
    assert exact_target([5, 0], 2) == [Fraction(1, 4), Fraction(3, 4)]  # counts are clipped at T
    assert exact_target([0, 0], 9) == [Fraction(1, 2)] * 2


def test_ratios_by_hand() -> None:
    v, n = torch.tensor([0.0, 1.0, 3.0, 7.0]), torch.tensor(3.0)
    assert complement.ratios(v, n).tolist() == [1, 0.75, 0.25, 0.25]
    assert complement.ratios(v, n, tau=2.0).tolist() == [1, 9 / 16, 1 / 16, 1 / 16]
    own = torch.tensor([0.0, 1.0, 1.0, 9.0]), torch.tensor([0.0, 1.0, 9.0, 9.0])
    torch.testing.assert_close(complement.ratios(*own), torch.tensor([1, 1 / 2, 9 / 10, 1 / 10]))


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (Prior(), ["1", "1", "1/2", "1/2", "1/4"]),
        (Prior(rounds=Fraction(3)), ["1", "1", "3/4", "2/3", "1/2"]),  # k / (n + k) where it was always rejected
        (Prior(Fraction(1, 3)), ["1", "2", "1/2", "1", "1/4"]),  # once in three accepted is as presumed
        (Prior(Fraction(1, 3), capped=True), ["1", "1", "1/2", "1", "1/4"]),
    ],
)
def test_a_prior_by_hand(prior: Prior, expected: list[str]) -> None:
    """Never up, accepted once, rejected once, accepted in one round of three, rejected in three."""
    counts, rounds = [0, 0, 1, 2, 3], [0, 1, 1, 3, 3]
    P = exact_target(counts, rounds, prior=prior)
    assert [p / P[0] for p in P] == [Fraction(r) for r in expected]
    got = complement.ratios(torch.tensor(counts).double(), torch.tensor(rounds).double(), prior=prior)
    assert got.tolist() == pytest.approx([float(Fraction(r)) for r in expected], rel=1e-15)


def test_the_share_accepted_is_pooled_over_the_file() -> None:
    assert share_accepted([1, 0, 45], [1, 1, 60]) == 16 / 62
    assert share_accepted([2, 9], [2, 5]) == 1.0  # nothing accepted
    assert share_accepted([], []) == 1.0


judged_options = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 99))  # v, n - v, mu
shares = st.integers(1, 9).flatmap(lambda d: st.integers(1, d).map(lambda n: Fraction(n, d)))
priors = st.builds(Prior, shares, st.fractions(Fraction(1, 9), 9, max_denominator=9), st.booleans())


@given(st.lists(judged_options, min_size=2, max_size=6), judged_options, priors)
def test_options_with_own_rounds_hold_the_axioms_and_leave_each_other_alone(
    options: list[tuple[int, int, int]], another: tuple[int, int, int], prior: Prior
) -> None:
    def exact(chosen: list[tuple[int, int, int]]) -> list[Fraction]:
        v, others, mu = zip(*chosen, strict=True)
        return exact_target(v, [a + b for a, b in zip(v, others, strict=True)], mu, prior)

    P = exact(options)
    assert all(p > 0 for p in P)
    assert sum(P) == 1
    per_mu = [p / mu for p, (*_, mu) in zip(P, options, strict=True)]
    for share, (v, others, _) in zip(per_mu, options, strict=True):
        for other_share, (other_v, other_others, _) in zip(per_mu, options, strict=True):
            if v + others == other_v + other_others and v < other_v:
                assert share >= other_share if prior.capped else share > other_share
    unseen = exact([*options, (0, 0, 1)])
    for share, (v, others, mu) in zip(unseen, options, strict=False):
        better, m = others - (v + others) * prior.mean, prior.mean  # than presumed, in rounds
        assert share / mu / unseen[-1] == min(1 + better / ((v + others + prior.rounds) * m), 1 if prior.capped else 99)
    with_another = exact([*options, another])
    assert [p / with_another[0] for p in with_another[:-1]] == [p / P[0] for p in P]
    columns = [torch.tensor(column).double() for column in zip(*options, strict=True)]
    got = complement.target(columns[0], columns[0] + columns[1], columns[2] / columns[2].sum(), prior=prior)
    torch.testing.assert_close(got, torch.tensor([float(p) for p in P], dtype=torch.double), rtol=1e-12, atol=0)


def test_a_larger_tau_is_more_rounds_for_an_option_rejected_in_all_of_them() -> None:
    base = random_distributions((2, 5), 0)
    once, in_sixty = torch.eye(5, dtype=torch.double)[:2], 60 * torch.eye(5, dtype=torch.double)[:2]
    larger = complement.target(once, torch.ones(()), base, math.log2(61))
    torch.testing.assert_close(larger, complement.target(in_sixty, torch.tensor(60.0), base))


@given(tables(), st.data())
def test_target_is_the_exact_one_and_that_holds_the_axioms(drawn: tuple[Table, int], data: st.DataObject) -> None:
    table, rounds = drawn
    sizes = data.draw(st.lists(st.integers(1, 99), min_size=len(table[0]), max_size=len(table[0])))
    base = torch.tensor(sizes).double() / sum(sizes)
    for got, row in zip(dense(table, rounds, base), table, strict=True):
        exact = exact_target(row, rounds, sizes)
        assert all(p > 0 for p in exact)
        assert sum(exact) == 1
        clipped = [min(v, rounds) for v in row]
        for v, p, mu in zip(clipped, exact, sizes, strict=True):
            for other_v, other_p, other_mu in zip(clipped, exact, sizes, strict=True):
                assert (v < other_v) == (p / mu > other_p / other_mu)
        expected = torch.tensor([float(p) for p in exact], dtype=torch.double)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@given(tables(), st.floats(0.1, 4), st.integers(0, 99))
def test_target_holds_the_axioms_at_every_tau(drawn: tuple[Table, int], tau: float, seed: int) -> None:
    table, rounds = drawn
    base = random_distributions((len(table), len(table[0])), seed)
    P = dense(table, rounds, base, tau)
    assert (P > 0).all()
    torch.testing.assert_close(P.sum(-1), torch.ones(len(table)).double())
    v, likelihood = torch.tensor(table).clamp_max(rounds), P / base
    fewer = v.unsqueeze(-1) < v.unsqueeze(-2)
    assert (likelihood.unsqueeze(-1) > likelihood.unsqueeze(-2))[fewer].all()


@given(tables(), st.floats(0.1, 4), priors, st.sampled_from([0.0, 0.1, 0.7]), st.integers(0, 99))
def test_sparse_target_is_the_dense_one(
    drawn: tuple[Table, int], tau: float, prior: Prior, min_p: float, seed: int
) -> None:
    table, rounds = drawn
    counts, base = sparse(table, rounds), random_distributions((len(table), len(table[0])), seed)
    v, n = counts.dense(counts.count, base.shape[-1]), counts.dense(counts.rounds, base.shape[-1])
    P = complement.target(v, n, base, tau, prior, min_p)
    if min_p:
        added = complement.plausible(
            base.log().masked_fill(complement.ratios(v, n, prior=prior) < 1, -torch.inf), min_p
        ) & (n == 0)
        counts = counts.with_unseen(*added.nonzero(as_tuple=True))
    got = complement.sparse_target(
        counts, base[counts.node, counts.option], base.shape[-1], tau, prior, keep_tail=min_p > 0
    )
    listed = counts.dense(torch.ones_like(counts.count), base.shape[-1]).bool()
    torch.testing.assert_close(got.listed, P[counts.node, counts.option])
    torch.testing.assert_close(got.unlisted, P.masked_fill(listed, 0).sum(-1), rtol=1e-9, atol=1e-12)
    assert ((got.unlisted == 0) == listed.all(-1)).all()


def test_a_confident_token_is_protected() -> None:
    """The target of a token at p with ratio r is p r / (1 - p (1 - r)), up to p = 1 itself."""
    counts = Counts(torch.arange(3), torch.zeros(3, dtype=torch.long), torch.ones(3), torch.full((3,), 3.0), 3)
    p = torch.tensor([0.9, 1 - 1e-6, 1.0])
    got = complement.sparse_target(counts, p, options=5)
    torch.testing.assert_close(got.listed, p * 0.75 / (1 - p * 0.25))
    assert (got.unlisted > 0).all()


# --- the tail that keeps its probability


def test_the_plausible_take_what_is_freed_by_hand() -> None:
    """Of mu = (12, 4, 3, 1)/20 the first was rejected: 3/4 of the likeliest other is plausible, 1/4 is not."""
    mu, once = torch.tensor([12.0, 4, 3, 1]).double() / 20, torch.tensor([1.0, 0, 0, 0]).double()
    got = complement.target(once, once, mu, min_p=0.5)
    Z = Fraction(6 + 4 + 3, 19)  # of 20ths, those that move had 19 and keep them
    expected = [6 / Z / 20, 4 / Z / 20, 3 / Z / 20, Fraction(1, 20)]
    assert exact_target([1, 0, 0, 0], [1, 0, 0, 0], [12, 4, 3, 1], min_p=Fraction(1, 2)) == expected
    torch.testing.assert_close(got, torch.tensor([float(p) for p in expected]).double())


@given(st.lists(judged_options, min_size=2, max_size=7), st.floats(1e-3, 1), st.floats(0.2, 3), priors)
def test_with_a_min_p_the_axioms_hold_and_the_tail_stays(
    options: list[tuple[int, int, int]], min_p: float, tau: float, prior: Prior
) -> None:
    v, others, mu = (torch.tensor(column).double() for column in zip(*options, strict=True))
    n, mu = v + others, mu / mu.sum()
    P, r = complement.target(v, n, mu, tau, prior, min_p), complement.ratios(v, n, tau, prior)
    assert (P > 0).all()
    torch.testing.assert_close(P.sum(), torch.ones(()).double())
    likeliest = mu[r >= 1].max() if (r >= 1).any() else 0
    tail = (n == 0) & (mu < min_p * likeliest * (1 - 1e-9))
    torch.testing.assert_close(P[tail], mu[tail], rtol=1e-12, atol=0)
    moving = ~((n == 0) & (mu < min_p * likeliest * (1 + 1e-9)))
    shares = P[moving] / (mu * r)[moving]  # one factor for all: so odds, and monotonicity, are those of (1)
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))


# --- Counts


def test_counts_by_hand() -> None:
    counts = sparse([[0, 2, 9], [0, 0, 0], [1, 0, 0]], 4)
    assert counts.rate.tolist() == [0.5, 1.0, 0.25]
    assert counts.sum_by_node(counts.count).tolist() == [11, 0, 1]
    assert counts.dense(counts.count, 3).tolist() == [[0, 2, 9], [0, 0, 0], [1, 0, 0]]
    last = counts.select(slice(1, 3))
    assert (last.node.tolist(), last.option.tolist(), last.rounds.tolist(), last.nodes) == ([1], [0], [4], 2)
    assert len(counts.select(slice(1, 2)).node) == 0


# --- the floor of the published objective


@pytest.mark.parametrize(
    ("case", "alpha", "tau"),
    [*((case, 0.7, 1.0) for case in CASES), *(("several nodes", *c) for c in [(1.0, 1.0), (0.2, 0.5), (0.7, 3.0)])],
)
def test_published_floor_is_the_least_loss(case: str, alpha: float, tau: float) -> None:
    table, rounds = CASES[case]
    counts, P = sparse(table, rounds), dense(table, rounds, tau=tau)
    floor = published_floor(counts, P.shape[-1], alpha, tau)
    torch.testing.assert_close(floor, least_published(P, counts, alpha), rtol=0, atol=1e-7)


@given(tables(), st.floats(0.05, 1), st.floats(0.2, 3), st.integers(0, 99), st.sampled_from([1e-3, 0.1, 3.0]))
def test_no_distribution_is_below_the_floor(
    drawn: tuple[Table, int], alpha: float, tau: float, seed: int, step: float
) -> None:
    """Random distributions, and small steps away from the optimum, where a floor too high would show."""
    table, rounds = drawn
    counts, shape = sparse(table, rounds), (len(table), len(table[0]))
    noise = random_distributions((20, *shape), seed).log() * step
    P = dense(table, rounds, tau=tau)
    q = alpha * P + (1 - alpha) * counts.dense(counts.rate, shape[-1])
    floor = published_floor(counts, shape[-1], alpha, tau)
    assert (published((q.log() + noise).log_softmax(-1), P, counts, alpha) >= floor - 1e-12).all()


@pytest.mark.parametrize(("case", "alpha"), [("nothing rejected", 0.3), *((case, 1.0) for case in CASES)])
def test_the_floor_is_zero_without_rejections_or_without_a_contrast(case: str, alpha: float) -> None:
    table, rounds = CASES[case]
    floor = published_floor(sparse(table, rounds), len(table[0]), alpha)
    torch.testing.assert_close(floor, torch.zeros(len(table)).double())


def test_the_published_optimum_of_one_rejection() -> None:
    """At a 49,152-token vocabulary and v = T = 1 it gives the rejected token 0.30, at a floor of 0.611 nats."""
    vocabulary = 49_152
    counts = Counts(*(torch.zeros(1, dtype=torch.long),) * 2, torch.ones(1).double(), torch.ones(1).double(), 1)
    floor = published_floor(counts, vocabulary, 0.7).item()
    assert floor == pytest.approx(0.611, abs=5e-4)
    P_rejected = 1 / (2 * vocabulary - 1)
    q = 0.7 * P_rejected + 0.3  # of pi*, since v sums to T
    assert q == pytest.approx(0.30, abs=1e-4)
    rest = 0.7 * (1 - P_rejected)
    entropy = -P_rejected * math.log(P_rejected) - (1 - P_rejected) * math.log(2 * P_rejected)
    cross_entropy = -q * math.log(q) - rest * math.log(rest / (vocabulary - 1))
    assert floor == pytest.approx(cross_entropy - 0.7 * entropy, abs=1e-9)
