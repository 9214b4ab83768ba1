"""Boundaries as a batch: many tries in one packed sequence, or a padded row for every path.

    boundaries --pack--> Batch --forward_hidden--> hidden states at the nodes --> the loss

*Packed* is the fast layout: every prompt and every shared prefix once, no padding; a token attends to its own path
through the trie only (see `models.packed_attention`). *Padded* is the layout for models whose attention cannot be
replaced (state-space layers, soft-capped attention): a row per response, transformers' own attention. Both have the
same hidden states at the same nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.segments import ROUND, Segment
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax


@dataclass(frozen=True)
class Answers:
    """The answers of a batch, as paths through the tries.

    Args:
        parent: node before each token of the tries. Shape: (tokens,).
        token: id of each token. Shape: (tokens,).
        token_index: the tokens of every answer, answer after answer, as indices of `token`. Shape: (entries,).
        answer_index: the answer of each entry. Shape: (entries,).
        rejected: whether each entry is a rejected token. Shape: (entries,).
        counts: rejections of each answer, with records as nodes. Shape of its entries: (answers,).
    """

    parent: Tensor
    token: Tensor
    token_index: Tensor
    answer_index: Tensor
    rejected: Tensor
    counts: Counts

    def to(self, device: torch.device) -> Answers:
        """The same answers on another device."""
        names = ("parent", "token", "token_index", "answer_index", "rejected")
        return Answers(**{name: getattr(self, name).to(device) for name in names}, counts=self.counts.to(device))

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (tokens,) over the tokens of each answer. Shape: (answers,)."""
        return values.new_zeros(len(self.counts.node)).index_add_(0, self.answer_index, values[self.token_index])


@dataclass(frozen=True)
class Batch:
    """Boundaries ready for a model.

    Args:
        input_ids: Shape: (rows, tokens).
        position_ids: distance of each token from the start of its prompt. Shape: (rows, tokens).
        nodes: index of each node's last token in the flattened ids. Shape: (nodes,).
        counts: judgements over the vocabulary at each node.
        record: index of each node's record in the batch. Shape: (nodes,).
        segments: the packed sequence's segments, or None for the padded layout.
        attention_mask: 1 on real tokens of the padded layout, or None. Shape: (rows, tokens).
        padding: number of padding tokens at the end of a packed sequence.
        numbers: indices of the records in the data set, the keys of cached references.
        normaliser: what the weighted sum of the losses is divided by, summed over the batches of a step; see
            `layout.make_batch`.
        weights: of the loss at each node; None for 1 each. Shape: (nodes,).
        answers: for an objective of whole answers.
        dropout_keys: see `dropout_keys`; None where nothing is dropped. Shape: (rows, tokens).
        reference: the reference's hidden states at the nodes, once computed. Shape: (nodes, width).
        reference_softmax: what the loss computes from `reference`, if it is cached.
    """

    input_ids: Tensor
    position_ids: Tensor
    nodes: Tensor
    counts: Counts
    record: Tensor
    segments: tuple[Segment, ...] | None = None
    attention_mask: Tensor | None = None
    padding: int = 0
    numbers: tuple[int, ...] = ()
    normaliser: float = 0.0
    weights: Tensor | None = None
    answers: Answers | None = None
    dropout_keys: Tensor | None = None
    reference: Tensor | None = None
    reference_softmax: ReferenceSoftmax | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return self.input_ids.numel() - self.padding

    @property
    def terms(self) -> int:
        """Number of terms of the loss: one per node, or for an objective of answers one per record."""
        return len(self.nodes) if self.answers is None else self.answers.counts.nodes

    def to(self, device: torch.device, **_: Any) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            nodes=self.nodes.to(device),
            counts=self.counts.to(device),
            record=self.record.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            answers=None if self.answers is None else self.answers.to(device),
            dropout_keys=None if self.dropout_keys is None else self.dropout_keys.to(device),
            reference=None if self.reference is None else self.reference.to(device),
        )

    def without_anchors(self) -> Batch:
        """The same batch with a loss only at nodes with rejections.

        With a reference the other nodes anchor the model; without one their target would be uniform over the
        vocabulary.
        """
        entries = self.counts
        rejected_nodes = entries.node[entries.count > 0].unique()
        is_rejected = torch.isin(entries.node, rejected_nodes)
        node = torch.searchsorted(rejected_nodes, entries.node[is_rejected])
        counts = Counts(
            node,
            entries.option[is_rejected],
            entries.count[is_rejected],
            entries.rounds[is_rejected],
            len(rejected_nodes),
        )
        weights = None if self.weights is None else self.weights[rejected_nodes]
        record = self.record[rejected_nodes]
        return replace(self, nodes=self.nodes[rejected_nodes], counts=counts, record=record, weights=weights)


def pack(boundaries: Sequence[Boundary]) -> Batch:
    """Concatenate boundaries in one sequence, padded to a multiple of `ROUND`.

    Args:
        boundaries: one per record.
    """
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[int] = []
    segments: list[Segment] = []
    for boundary in boundaries:
        start, prompt = len(ids), len(boundary.prompt)
        ids += boundary.prompt + boundary.tokens
        positions += range(prompt)
        nodes += range(start + prompt - 1, start + prompt + len(boundary.tokens))
        for run, parent in zip(boundary.run_slices(), boundary.parents, strict=True):
            path = boundary.path(parent)
            depth = prompt + sum(piece.stop - piece.start for piece in path)
            length = run.stop - run.start
            positions += range(depth, depth + length)
            first = start + prompt  # first token after the prompt
            if run.start == 0:  # the first run continues the prompt
                segments.append(Segment(prompt + length))
                continue
            context = [(start, first), *((first + piece.start, first + piece.stop) for piece in path)]
            segments.append(Segment(length, tuple(_merge_adjacent(context))))
    padding = -len(ids) % ROUND
    if padding:
        segments.append(Segment(padding))
        ids += [0] * padding
        positions += range(padding)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        nodes=torch.tensor(nodes),
        counts=_make_counts(boundaries),
        record=_node_records(boundaries),
        segments=tuple(segments),
        padding=padding,
    )


def pad_paths(boundaries: Sequence[Boundary]) -> Batch:
    """Put every path from a prompt to the end of a run in a row, padded on the right.

    Args:
        boundaries: one per record.
    """
    rows: list[list[int]] = []
    cells: list[tuple[int, int]] = []  # row and column of each node
    for boundary in boundaries:
        prompt = len(boundary.prompt)
        for run in boundary.run_slices():
            row = boundary.prompt + boundary.path_tokens(run.stop)
            if run.start == 0:
                cells.append((len(rows), prompt - 1))
            new = run.stop - run.start
            cells += [(len(rows), column) for column in range(len(row) - new, len(row))]
            rows.append(row)
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(width).expand(len(rows), width)
    return Batch(
        input_ids=torch.stack([pad(torch.tensor(row), (0, width - len(row))) for row in rows]),
        position_ids=columns.contiguous(),
        nodes=torch.tensor([row * width + column for row, column in cells]),
        counts=_make_counts(boundaries),
        record=_node_records(boundaries),
        attention_mask=(columns < lengths.unsqueeze(1)).long(),
    )


def dropout_keys(batch: Batch, boundaries: Sequence[Boundary]) -> Tensor:
    """A number for each token that goes with its record, whatever the batch. Shape: (rows, tokens).

    Args:
        batch: of the boundaries, with its `numbers`.
        boundaries: one per record.
    """
    keys = torch.zeros_like(batch.input_ids)
    start = 0
    for number, boundary in zip(batch.numbers, boundaries, strict=True):
        if batch.segments is not None:
            places = torch.arange(boundary.size)
            keys[0, start : start + boundary.size] = (number << 32) + places
            start += boundary.size
        else:
            rows = len(boundary.runs)
            keys[start : start + rows] = (number << 32) + (torch.arange(rows).unsqueeze(1) << 20)
            keys[start : start + rows] += torch.arange(keys.shape[1])
            start += rows
    return keys


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Concatenate packed batches, and their nodes, for `forward_hidden`. Counts, records and answers are left out.

    Args:
        batches: in the packed layout.
    """
    starts = list(accumulate((batch.input_ids.shape[1] for batch in batches), initial=0))
    segments = [
        replace(segment, context=tuple((start + first, start + last) for first, last in segment.context))
        for batch, start in zip(batches, starts, strict=False)
        for segment in batch.segments or ()
    ]
    empty = torch.empty(0)
    return Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids for batch in batches], 1),
        nodes=torch.cat([batch.nodes + start for batch, start in zip(batches, starts, strict=False)]),
        counts=Counts(empty, empty, empty, empty, 0),
        record=empty,
        segments=tuple(segments),
    )


def collect_answers(boundaries: Sequence[Boundary]) -> Answers:
    """The answers of boundaries, in the order of a batch.

    An answer that a record has twice, with other spans, is one: its counts and rounds add up.

    Args:
        boundaries: one per record, made by `merge_responses`.
    """
    parent: list[int] = []
    token: list[int] = []
    token_index: list[int] = []
    answer_index: list[int] = []
    rejected: list[bool] = []
    record: list[int] = []
    count: list[int] = []
    rounds: list[int] = []
    nodes = 0
    for number, boundary in enumerate(boundaries):
        counts: Counter[int] = Counter()
        judged: Counter[int] = Counter()
        for end, rejections, times in zip(boundary.ends, boundary.counts, boundary.rounds, strict=True):
            counts[end] += rejections
            judged[end] += times
        rejected_edges = {(node, wrong) for node, wrong, times, *_ in boundary.judgements if times}
        first = len(token)
        parents = [0] * len(boundary.tokens)
        for end in counts:
            for node, child in boundary.steps(end):
                parents[child - 1] = node
                token_index.append(first + child - 1)
                answer_index.append(len(record))
                rejected.append((node, boundary.tokens[child - 1]) in rejected_edges)
            record.append(number)
            count.append(counts[end])
            rounds.append(judged[end])
        parent += [nodes + node for node in parents]
        token += boundary.tokens
        nodes += boundary.nodes
    answer_counts = Counts(
        torch.tensor(record),
        torch.arange(len(record)),
        torch.tensor(count, dtype=torch.float32),
        torch.tensor(rounds, dtype=torch.float32),
        len(boundaries),
    )
    return Answers(
        torch.tensor(parent),
        torch.tensor(token),
        torch.tensor(token_index, dtype=torch.long),
        torch.tensor(answer_index, dtype=torch.long),
        torch.tensor(rejected),
        answer_counts,
    )


def _merge_adjacent(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged = [pieces[0]]
    for start, end in pieces[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        elif end > start:
            merged.append((start, end))
    return merged


def _make_counts(boundaries: Sequence[Boundary]) -> Counts:
    node: list[int] = []
    token: list[int] = []
    count: list[int] = []
    rounds: list[int] = []
    nodes = 0
    for boundary in boundaries:
        for judgement in boundary.judgements:
            node.append(nodes + judgement.node)
            token.append(judgement.token)
            count.append(judgement.rejected)
            rounds.append(judgement.judged)
        nodes += boundary.nodes
    return Counts(
        torch.tensor(node, dtype=torch.long),
        torch.tensor(token, dtype=torch.long),
        torch.tensor(count, dtype=torch.float32),
        torch.tensor(rounds, dtype=torch.float32),
        nodes,
    )


def _node_records(boundaries: Sequence[Boundary]) -> Tensor:
    sizes = torch.tensor([boundary.nodes for boundary in boundaries])
    return torch.repeat_interleave(torch.arange(len(boundaries)), sizes)
