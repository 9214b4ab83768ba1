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
from itertools import islice, pairwise
from typing import Any

from buleyean_rl.data.encode import encode_prompts, encode_responses
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
    return build_boundaries([record], tokenizer, max_length)[0]


def build_boundaries(records: Sequence[RejectionRecord], tokenizer: Any, max_length: int) -> list[Boundary | None]:
    """Tokenise records and merge the responses of each into a trie.

    Args:
        records: what was rejected; so few that all their token ids fit in memory.
        tokenizer: a transformers tokenizer; a fast one takes many records in several threads.
        max_length: tokens of prompt and response together; longer responses are cut at the end.

    Returns:
        Of each record the boundary, or None where the prompt leaves no room for a response or nothing rejected
        remains.
    """
    prompts = encode_prompts(tokenizer, [record.prompt for record in records])
    fits = [bool(prompt) and len(prompt) < max_length for prompt in prompts]
    fitting = [record for record, fit in zip(records, fits, strict=True) if fit]
    texts = [text for record in fitting for text in record.rejected_responses]
    spans = [spans for record in fitting for spans in record.rejected_spans]
    encoded = iter(encode_responses(tokenizer, texts, spans))
    return [
        _merge_record(record, prompt, list(islice(encoded, len(record.rejected_responses))), max_length)
        if fit
        else None
        for record, prompt, fit in zip(records, prompts, fits, strict=True)
    ]


def _merge_record(
    record: RejectionRecord, prompt: list[int], responses: list[tuple[list[int], list[bool]]], max_length: int
) -> Boundary | None:
    room = max_length - len(prompt)
    truncated = sum(len(ids) > room for ids, _ in responses)
    cut = [(ids[:room], rejected[:room]) for ids, rejected in responses]
    boundary = merge_responses(prompt, cut, record.rejection_counts, max(record.rounds), truncated)
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
