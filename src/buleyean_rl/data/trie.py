"""The void boundary: a record's rejected responses as one prefix trie of token ids.

    record --tokenizer--> prompt ids + responses' ids --merge shared prefixes--> Boundary

A node is a point where the model chooses a next token: node 0 is the end of the prompt, node k the point
after the k-th token of the trie. At a node, v_i counts the rejections that pass through it and go on with
token i. Tokens outside the rejected spans add nothing to v, and neither does the end of a response: that an
answer stopped there was never what was wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from buleyean_rl.data.encode import EncodedQuestion, Encoder
from buleyean_rl.data.records import RejectionRecord


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
        rejections: (node, token, v) of every rejected continuation, sorted by node.
        rounds: T of the record.
        truncated: how many responses lost tokens to the length limit.
        ends: the node at which each response ends.
        counts: how often each response was rejected.
        index: its number in the data set it was read from, if any; not compared.
    """

    prompt: list[int]
    tokens: list[int]
    runs: list[int]
    parents: list[int]
    rejections: list[tuple[int, int, int]]
    rounds: int
    truncated: int = 0
    ends: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    index: int | None = field(default=None, compare=False)

    @property
    def nodes(self) -> int:
        """How many nodes there are: one per token, and the end of the prompt."""
        return len(self.tokens) + 1

    @property
    def size(self) -> int:
        """How many tokens there are, the prompt's included."""
        return len(self.prompt) + len(self.tokens)

    def run_slices(self) -> list[slice]:
        """Each run's tokens, as a slice of `tokens`."""
        return [slice(a, b) for a, b in zip(self.runs, [*self.runs, len(self.tokens)][1:], strict=True)]

    def path(self, node: int) -> list[slice]:
        """The tokens from the prompt to `node`, as slices of `tokens` in order."""
        slices = self.run_slices()
        pieces = []
        while node > 0:
            run = max(r for r, piece in enumerate(slices) if piece.start < node)
            pieces.append(slice(slices[run].start, node))
            node = self.parents[run]
        return pieces[::-1]

    def steps(self, end: int) -> list[tuple[int, int]]:
        """Every (node, next node) from the end of the prompt to `end`; the token between them is next node - 1."""
        nodes = (place + 1 for piece in self.path(end) for place in range(piece.start, piece.stop))
        return list(pairwise([0, *nodes]))


def build_boundary(record: RejectionRecord, tokenizer: Any, max_length: int) -> Boundary | None:
    """Tokenise one record, see `build_boundaries`."""
    return build_boundaries([record], Encoder(tokenizer, max_length))[0]


def build_boundaries(records: Sequence[RejectionRecord], encoder: Encoder) -> list[Boundary | None]:
    """Tokenise records and merge the responses of each into a trie.

    Args:
        records: what was rejected; so few that all their token ids fit in memory.
        encoder: of the base model; responses are cut at its `max_length`, and it counts what is left out.

    Returns:
        Of each record the boundary, or None where the prompt leaves no room for a response, the chat template refuses
        it, or nothing rejected remains.
    """
    questions = encoder.encode_records(records)
    return [_merge_record(record, question, encoder) for record, question in zip(records, questions, strict=True)]


def _merge_record(record: RejectionRecord, question: EncodedQuestion, encoder: Encoder) -> Boundary | None:
    prompt = question.prompt
    if not encoder.has_room(prompt):
        encoder.counts["no_room"] += prompt.refusal is None
        return None
    room = encoder.max_length - len(prompt.ids)
    truncated = sum(answer.length > room for answer in question.answers)
    cut = [(answer.ids[:room], answer.rejected[:room]) for answer in question.answers]
    boundary = merge_responses(prompt.ids, cut, record.rejection_counts, max(record.rounds), truncated)
    encoder.counts["nothing_rejected"] += not boundary.rejections
    return boundary if boundary.rejections else None


def merge_responses(
    prompt: list[int],
    responses: Sequence[tuple[list[int], list[bool]]],
    counts: Sequence[int],
    rounds: int,
    truncated: int = 0,
) -> Boundary:
    """The trie of some responses.

    Args:
        prompt: token ids.
        responses: token ids of each, and which of its tokens are rejected.
        counts: how often each was rejected; one that never was only adds its nodes.
        rounds: T.
        truncated: how many were cut.
    """
    children: list[dict[int, int]] = [{}]
    tokens: list[int] = []
    runs: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    rejections: dict[tuple[int, int], int] = {}
    for (ids, rejected), count in zip(responses, counts, strict=True):
        node, growing = 0, False
        for token, is_rejected in zip(ids, rejected, strict=True):
            if is_rejected and count:
                rejections[node, token] = rejections.get((node, token), 0) + count
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
    entries = sorted((node, token, v) for (node, token), v in rejections.items())
    return Boundary(prompt, tokens, runs, parents, entries, rounds, truncated, ends, list(counts))
