"""The void boundary: a record's judged responses as one prefix trie of token ids.

    record --tokenizer--> prompt ids + responses' ids --merge shared prefixes--> Boundary

A node is a point where the model chooses a next token: node 0 is the end of the prompt, node k the point
after the k-th token of the trie. At a node, n_i and v_i are the sums of rounds and rejections over the responses
that pass through it and go on with token i. Tokens outside the rejected spans add nothing to them, and neither does
the end of a response: that an answer stopped there was never what was wrong with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from buleyean_rl.data.encode import EncodedQuestion, Encoder
from buleyean_rl.data.records import RejectionRecord


class Judgement(NamedTuple):
    """A continuation of a node that was up for rejection.

    Args:
        node: where it stands.
        token: the one that was judged there.
        rejected: v >= 0, in how many rounds it was rejected.
        judged: n >= 1, of how many, over all responses that go on with it.
        largest_rounds: the largest T of one of them: the rounds where all responses were judged in the same ones.
    """

    node: int
    token: int
    rejected: int
    judged: int
    largest_rounds: int


@dataclass(frozen=True)
class Boundary:
    """The prefix trie of one record, flat.

    The trie grows in *runs*: each response adds the part of it that no earlier response shares, as one
    unbranched piece that hangs from an existing node.

    Args:
        prompt: token ids of the prompt, up to where the answer begins.
        tokens: token ids of the nodes 1, 2, ..., run after run.
        runs: where each run starts in `tokens`.
        parents: the node each run hangs from.
        judgements: every judged continuation, sorted by node.
        truncated: how many responses lost tokens to the length limit.
        ends: the node at which each response ends.
        counts: how often each response was rejected.
        rounds: how often each was judged.
        index: its number in the data set it was read from, if any; not compared.
    """

    prompt: list[int]
    tokens: list[int]
    runs: list[int]
    parents: list[int]
    judgements: list[Judgement]
    truncated: int = 0
    ends: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    index: int | None = field(default=None, compare=False)

    @property
    def nodes(self) -> int:
        """How many nodes there are: one per token, and the end of the prompt."""
        return len(self.tokens) + 1

    @property
    def size(self) -> int:
        """How many tokens there are, the prompt's included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def rejected_ends(self) -> set[int]:
        """Where the rejected answers end that have a token."""
        return {end for end, count in zip(self.ends, self.counts, strict=True) if end and count}

    @property
    def accepted_ends(self) -> set[int]:
        """Where the answers end that have a token and were never rejected: the anchors."""
        return set(self.ends) - self.rejected_ends - {0}

    @property
    def rejected_answers(self) -> int:
        """How many answers were rejected, those alike once; without one the boundary only anchors."""
        return len(self.rejected_ends)

    @property
    def accepted_answers(self) -> int:
        """How many answers were never rejected, those alike once."""
        return len(self.accepted_ends)

    def run_slices(self) -> list[slice]:
        """Each run's tokens, as a slice of `tokens`."""
        return [slice(a, b) for a, b in zip(self.runs, [*self.runs, len(self.tokens)][1:], strict=True)]

    def path(self, node: int) -> list[slice]:
        """The tokens from the prompt to `node`, as slices of `tokens` in order."""
        pieces = []
        while node > 0:
            run = bisect_left(self.runs, node) - 1  # the last that starts before the node
            pieces.append(slice(self.runs[run], node))
            node = self.parents[run]
        return pieces[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """The token ids from the prompt to `node`."""
        return [token for piece in self.path(node) for token in self.tokens[piece]]

    def rejected_terms_per_answer(self) -> float:
        """How many nodes at which something was rejected a rejected answer passes, on average."""
        counted = {judgement.node for judgement in self.judgements if judgement.rejected}
        passed = [int(0 in counted)]
        for run, parent in zip(self.run_slices(), self.parents, strict=True):
            terms = passed[parent]
            for node in range(run.start + 1, run.stop + 1):
                terms += node in counted
                passed.append(terms)
        ends = self.rejected_ends
        return sum(passed[end] for end in ends) / len(ends) if ends else float(len(counted))

    def node_weights(self, anchor_weight: float) -> list[float]:
        """What the loss at each node counts: 1 in all for a rejected answer, shared evenly by the nodes that it passes.

        An accepted answer counts `anchor_weight` in the same way, less the nodes that it shares with a rejected one:
        what it has in common with that is in its weight already.

        Args:
            anchor_weight: of each accepted answer.
        """
        before, length = [0] * self.nodes, [1] * self.nodes
        for run, parent in zip(self.run_slices(), self.parents, strict=True):
            for node in range(run.start + 1, run.stop + 1):
                before[node] = parent if node == run.start + 1 else node - 1
                length[node] = length[before[node]] + 1
        rejected, accepted = ([0.0] * self.nodes for _ in range(2))
        for weights, ends, each in (
            (rejected, self.rejected_ends, 1.0),
            (accepted, self.accepted_ends, anchor_weight),
        ):
            for end in ends:
                weights[end] += each / length[end]
            for node in range(self.nodes - 1, 0, -1):  # parents stand before their children
                weights[before[node]] += weights[node]
        return [weight or anchor for weight, anchor in zip(rejected, accepted, strict=True)]

    def steps(self, end: int) -> list[tuple[int, int]]:
        """Every (node, next node) from the end of the prompt to `end`; the token between them is next node - 1."""
        nodes = (place + 1 for piece in self.path(end) for place in range(piece.start, piece.stop))
        return list(pairwise([0, *nodes]))


def build_boundary(record: RejectionRecord, tokenizer: Any, max_length: int) -> Boundary | None:
    """Tokenise one record, see `build_boundaries`."""
    return build_boundaries([record], Encoder(tokenizer, max_length))[0]


def build_boundaries(
    records: Sequence[RejectionRecord], encoder: Encoder, max_rejected: int | None = None
) -> list[Boundary | None]:
    """Tokenise records and merge the responses of each into a trie.

    Args:
        records: what was rejected; so few that all their token ids fit in memory.
        encoder: of the base model; responses are cut at its `max_length`, and it counts what is left out.
        max_rejected: tokens that are rejected of a response of which parts are, and where it ends; None for all.

    Returns:
        Of each record the boundary, or None where the prompt leaves no room for a response, the chat template refuses
        it, or nothing remains of what was rejected or, in a record without a rejection, of any response.
    """
    questions = encoder.encode_records(records)
    pairs = zip(records, questions, strict=True)
    return [_merge_record(record, question, encoder, max_rejected) for record, question in pairs]


def _merge_record(
    record: RejectionRecord, question: EncodedQuestion, encoder: Encoder, max_rejected: int | None
) -> Boundary | None:
    prompt = question.prompt
    if not encoder.has_room(prompt):
        encoder.counts["no_room"] += prompt.refusal is None
        return None
    room = encoder.max_length - len(prompt.ids)
    truncated = sum(answer.length > room for answer in question.answers)
    ends = [min(room, _rejected_end(answer.rejected, max_rejected)) for answer in question.answers]
    cut = [(answer.ids[:end], answer.rejected[:end]) for answer, end in zip(question.answers, ends, strict=True)]
    boundary = merge_responses(prompt.ids, cut, record.rejection_counts, record.rounds, truncated)
    is_usable = (
        any(judgement.rejected for judgement in boundary.judgements) if record.rejects else bool(boundary.tokens)
    )
    encoder.counts["nothing_rejected"] += not is_usable
    return boundary if is_usable else None


def _rejected_end(rejected: Sequence[bool], most: int | None) -> int:
    """Where a response ends of which so many tokens may be rejected, if not all of it is."""
    if most is None or all(rejected):
        return len(rejected)
    return next((end for end, count in enumerate(accumulate(rejected), 1) if count == most), len(rejected))


def merge_responses(
    prompt: list[int],
    responses: Sequence[tuple[list[int], list[bool]]],
    counts: Sequence[int],
    rounds: Sequence[int],
    truncated: int = 0,
) -> Boundary:
    """The trie of some responses.

    Args:
        prompt: token ids.
        responses: token ids of each, and which of its tokens were judged.
        counts: how often each was rejected; one that never was adds its nodes and its rounds.
        rounds: how often each was judged.
        truncated: how many were cut.
    """
    children: list[dict[int, int]] = [{}]
    tokens: list[int] = []
    runs: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    judgements: dict[tuple[int, int], tuple[int, int, int]] = {}
    for (ids, judged), count, times in zip(responses, counts, rounds, strict=True):
        node, growing = 0, False
        for token, is_judged in zip(ids, judged, strict=True):
            if is_judged:
                v, n, largest = judgements.get((node, token), (0, 0, 0))
                judgements[node, token] = v + count, n + times, max(largest, times)
            if token not in children[node]:
                if not growing:
                    runs.append(len(tokens))
                    parents.append(node)
                    growing = True
                tokens.append(token)
                children[node][token] = len(tokens)
                children.append({})
            node = children[node][token]
        ends.append(node)
    entries = sorted(Judgement(*place, *sums) for place, sums in judgements.items())
    return Boundary(prompt, tokens, runs, parents, entries, truncated, ends, list(counts), list(rounds))
