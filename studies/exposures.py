"""Counts that know what was shown: which reading of the same judgements learns most for the drift it costs.

    python studies/exposures.py -o FOLDER

No model: a language of 6 tokens and 4 places, whose base is a random tree, can be counted out. A rule rejects some of
what the base says; some answers are drawn from it and judged whole; each reading of the judgements gives weights at
every node of the trie, and tau is set so that every policy drifts by the same KL(base, policy). Measured is how much
more of what the policy says is accepted, in points, mean over the trees.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from buleyean_rl.objectives.complement import Prior, share_accepted, target
from harness import Summary, markdown

TOKENS, PLACES, TREES, DRIFT = 6, 4, 40, 0.05
ANSWERS = torch.tensor(list(itertools.product(range(TOKENS), repeat=PLACES)))
NODE = [(ANSWERS[:, :place] * TOKENS ** torch.arange(place).flip(0)).sum(1) for place in range(PLACES)]
Target = Callable[[Tensor, float], Tensor]  # a place's base and tau --> the policy there


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.double)


RULES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "first token": lambda g: (_random(g, TOKENS).argsort() < 3)[ANSWERS[:, 0]],
    "last token": lambda g: (_random(g, TOKENS).argsort() < 3)[ANSWERS[:, -1]],
    "a token anywhere": lambda g: (torch.randint(TOKENS, (), generator=g) == ANSWERS).any(1),
    "pairs of tokens": lambda g: (_random(g, TOKENS, TOKENS) < 0.25)[ANSWERS[:, :-1], ANSWERS[:, 1:]].any(1),
    "no pattern": lambda g: _random(g, len(ANSWERS)) < 0.5,
}


@dataclass(frozen=True)
class Tree:
    """A base model: its next-token distributions at each place, (nodes, tokens), and which answers a rule rejects."""

    nodes: list[Tensor]
    rejected: Tensor

    @property
    def base(self) -> Tensor:
        """The probability of each answer."""
        return answer_log(self.nodes).exp()


@dataclass(frozen=True)
class Judged:
    """At each place n and v of every node's tokens, (nodes, tokens), and the share of the answers that was accepted."""

    rounds: list[Tensor]
    counts: list[Tensor]
    accepted: float


def answer_log(nodes: list[Tensor]) -> Tensor:
    """Log-probability of each answer under a distribution at each node. Shape: (answers,)."""
    return torch.stack([x.log()[NODE[place], ANSWERS[:, place]] for place, x in enumerate(nodes)]).sum(0)


def trees(rule: str, number: int, seed: int = 0) -> Iterator[tuple[Tree, torch.Generator]]:
    """Trees of which a rule rejects a tenth to nine tenths, each with the dice to draw answers by."""
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.distributions.Gamma(torch.tensor(0.5).double(), 1)
    found = 0
    while found < number:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            draws = [gamma.sample((TOKENS**place, TOKENS)).clamp_min(1e-12) for place in range(PLACES)]
        tree = Tree([x / x.sum(1, keepdim=True) for x in draws], RULES[rule](generator))
        if 0.1 < tree.base[tree.rejected].sum() < 0.9:
            found += 1
            yield tree, generator


def judge(tree: Tree, answers: int, generator: torch.Generator) -> Judged:
    """Draw answers from the base, each judged once."""
    drawn = torch.multinomial(tree.base, answers, replacement=True, generator=generator)
    verdict = tree.rejected[drawn].double()
    rounds, counts = [], []
    for place in range(PLACES):
        index = NODE[place][drawn] * TOKENS + ANSWERS[drawn, place]
        empty = torch.zeros(TOKENS ** (place + 1)).double()
        rounds.append(empty.index_add(0, index, torch.ones(answers).double()).view(-1, TOKENS))
        counts.append(empty.index_add(0, index, verdict).view(-1, TOKENS))
    return Judged(rounds, counts, share_accepted(verdict.int().tolist(), [1] * answers))


def readings(judged: Judged) -> dict[str, list[Target]]:
    """What the same judgements may be taken to say: a target at each place."""

    def own(prior: Prior, min_p: float = 0.0) -> list[Target]:
        return [
            lambda base, tau, v=v, n=n: target(v, n, base, tau, prior, min_p)
            for v, n in zip(judged.counts, judged.rounds, strict=True)
        ]

    total = float(judged.rounds[0].sum())
    m = judged.accepted
    return {
        "published": [lambda base, tau, v=v: target(v, torch.full_like(v, total), base, tau) for v in judged.counts],
        "60 of 60": [
            lambda base, tau, v=v: target(60 * (v > 0).double(), 60 * (v > 0).double(), base, tau)
            for v in judged.counts
        ],
        "own rounds, m = 1, k = 1": own(Prior()),
        "own rounds, m = 1, k = 1, min-p 0.1": own(Prior(), 0.1),
        "m = accepted, k = 1": own(Prior(m)),
        "m = accepted, k = 4": own(Prior(m, 4.0)),
        "m = accepted, k = 4, at most 1": own(Prior(m, 4.0, capped=True)),
        "m = accepted, k = 4, min-p 0.1": own(Prior(m, 4.0), 0.1),
    }


def policy_at(tree: Tree, reading: list[Target], drift: float = DRIFT) -> list[Tensor]:
    """The policy that a reading aims at with the tau at which KL(base, policy) is `drift`, or with tau = 60."""
    base, low, high = answer_log(tree.nodes), 0.0, 60.0
    for _ in range(22):
        tau = (low + high) / 2
        policy = [at(nodes, tau) for at, nodes in zip(reading, tree.nodes, strict=True)]
        far = (base.exp() * (base - answer_log(policy))).sum() > drift
        low, high = (low, tau) if far else (tau, high)
    return [at(nodes, low) for at, nodes in zip(reading, tree.nodes, strict=True)]


def measure(rule: str, answers: int, number: int = TREES) -> dict[str, dict[str, float]]:
    """Of each reading, means over trees: points of accepted answers gained, and entropy gained in nats an answer."""
    gains: dict[str, list[list[float]]] = {}
    for tree, generator in trees(rule, number):
        base = tree.base
        for name, reading in readings(judge(tree, answers, generator)).items():
            log_policy = answer_log(policy_at(tree, reading))
            more = (log_policy.exp() - base)[~tree.rejected].sum()
            entropy = (base * base.log()).sum() - (log_policy.exp() * log_policy).sum()
            gains.setdefault(name, []).append([100 * float(more), float(entropy)])
    means = {name: torch.tensor(values).double().mean(0).tolist() for name, values in gains.items()}
    return {name: {"accepted_more": more, "entropy_more": entropy} for name, (more, entropy) in means.items()}


def table(folder: Path) -> str:
    """Points gained, a row a reading and a column a rule, and the mean change of entropy."""
    rows = Summary(folder).rows
    lines = []
    for answers, name in dict.fromkeys((row["answers"], row["reading"]) for row in rows.values()):
        of_it = [row for row in rows.values() if (row["answers"], row["reading"]) == (answers, name)]
        points = {row["rule"]: f"{row['accepted_more']:.1f}" for row in of_it}
        entropy = sum(row["entropy_more"] for row in of_it) / len(of_it)
        lines.append([str(answers), name, *(points.get(rule, "") for rule in RULES), f"{entropy:+.2f}"])
    return markdown(["answers", "reading", *RULES, "entropy, mean"], lines)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    for answers, rule in itertools.product((8, 64), RULES):
        if f"{answers} {rule} published" in summary.rows:
            continue
        for name, figures in measure(rule, answers).items():
            summary.add(f"{answers} {rule} {name}", {"answers": answers, "rule": rule, "reading": name, **figures})
    print(table(arguments.output))


if __name__ == "__main__":
    main()
