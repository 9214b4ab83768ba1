"""A model -> log-probabilities of answers and of plain texts, a window of items at a time.

`PackedScorer` has the model in memory: all answers to a prompt are one trie, many tries are one row, and a run's
base model is the same model with its adapter off, so both come from one pass over the data. `EngineScorer` asks
an engine for one token after the other: slow, and without distributions, but it works wherever an engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import choose_layout, make_batch
from buleyean_rl.batching.rows import bin_pack, micro_batch_tokens
from buleyean_rl.data.encode import encode_prompts, encode_responses
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.evaluation.neutral_text import neutral_boundary
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.models.views import backbone, eval_mode, output_head, plain_model
from buleyean_rl.objectives.likelihood import compare_distributions, token_nlls
from buleyean_rl.objectives.losses import Objective

WINDOW = 256  # items whose token ids are in memory; within them the rows are filled by length
EVERY_TOKEN = Objective("published")  # has a node wherever a token is to be predicted, and nowhere else


class AnswerScore(NamedTuple):
    """How likely an answer is.

    Args:
        nats: -log pi(answer | prompt), the end of the answer not counted.
        tokens: how many tokens that is over; 0 for an answer without room behind its prompt.
        reference_nats: the same of the reference, or None without one.
        cut: whether the answer was longer than the limit.
    """

    nats: float
    tokens: int
    reference_nats: float | None
    cut: bool


class TextScore(NamedTuple):
    """What a plain text is to a model: sums over its predicted tokens, in nats.

    Args:
        nats: -log pi(text).
        tokens: how many.
        reference_nats: the same of the reference, or None without one.
        kl: sum of KL(pi_ref || pi), or None without a reference.
        entropy: sum of H(pi), or None where whole distributions are not to be had.
    """

    nats: float
    tokens: int
    reference_nats: float | None
    kl: float | None
    entropy: float | None


Question = tuple[Prompt, Sequence[str]]  # a prompt, and answers to it
OnDone = Callable[[int], None]


class Scorer(Protocol):
    """What scores answers and texts."""

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """The score of every answer, in order; `on_done` is told how many questions are done."""

    def texts(self, texts: Sequence[str], on_done: OnDone | None = None) -> list[TextScore | None]:
        """The score of every text, None for one too short to predict a token of."""


class PackedScorer:
    """A transformers model in memory; of a PEFT model the base is the reference.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: its tokenizer.
        max_length: most tokens of a prompt and one answer, or of a text.
        with_reference: score the base of a PEFT model too.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, *, with_reference: bool = True) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self._has_reference = with_reference and hasattr(model, "peft_config")
        self._layout, self._head = choose_layout(model), output_head(model)

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """See `Scorer.answers`."""
        scores: list[list[AnswerScore]] = []
        for start in range(0, len(questions), WINDOW):
            window = questions[start : start + WINDOW]
            tries = [self._trie(prompt, answers) for prompt, answers in self._encode(window)]
            nats = self._edge_nats([boundary for boundary, _, _ in tries], scores, on_done)
            for (_, paths, cut), (own, base) in zip(tries, nats, strict=True):
                scores.append(
                    [
                        AnswerScore(_sum(own, path), len(path), None if base is None else _sum(base, path), is_cut)
                        for path, is_cut in zip(paths, cut, strict=True)
                    ]
                )
        return scores

    def texts(self, texts: Sequence[str], on_done: OnDone | None = None) -> list[TextScore | None]:
        """See `Scorer.texts`."""
        scores: list[TextScore | None] = []
        for start in range(0, len(texts), WINDOW):
            window = [neutral_boundary(self.tokenizer, text, self.max_length) for text in texts[start : start + WINDOW]]
            numbered = {i: boundary for i, boundary in enumerate(window) if boundary is not None}
            found: list[TextScore | None] = [None] * len(window)
            done = start + len(window) - len(numbered)
            for row, batch in self._rows(numbered):
                hidden, reference = self._states(batch)
                figures = compare_distributions(hidden, reference, self._head, batch.counts.option)
                sums = [None if part is None else _per_record(part, batch, len(row)) for part in figures]
                for number, i in enumerate(row):
                    nats, base, kl, entropy = (None if part is None else part[number] for part in sums)
                    found[i] = TextScore(nats or 0.0, len(numbered[i].tokens), base, kl, entropy)
                done += len(row)
                if on_done is not None:
                    on_done(done)
            scores += found
        return scores

    def _encode(self, questions: Sequence[Question]) -> Iterator[tuple[list[int], list[list[int]]]]:
        prompts = encode_prompts(self.tokenizer, [prompt for prompt, _ in questions])
        texts = [answer for _, answers in questions for answer in answers]
        encoded = iter(encode_responses(self.tokenizer, texts, [()] * len(texts)))
        for ids, (_, answers) in zip(prompts, questions, strict=True):
            yield ids, [next(encoded)[0] for _ in answers]

    def _trie(self, prompt: list[int], answers: list[list[int]]) -> tuple[Boundary | None, list[list[int]], list[bool]]:
        """The trie of some answers, each answer's edges in it, and which were cut; None where there is no room."""
        room = self.max_length - len(prompt) if prompt else 0
        cut = [len(ids) > room for ids in answers]
        kept = [ids[: max(room, 0)] for ids in answers]
        if not any(kept):
            return None, [[] for _ in answers], cut
        boundary = merge_responses(prompt, [(ids, [True] * len(ids)) for ids in kept], [1] * len(kept), len(kept))
        return boundary, edges_of(boundary), cut

    def _edge_nats(
        self, tries: Sequence[Boundary | None], before: Sequence[object], on_done: OnDone | None
    ) -> list[tuple[list[float], list[float] | None]]:
        """Of each trie, -log pi of every edge, and the reference's; nothing for None."""
        numbered = {i: boundary for i, boundary in enumerate(tries) if boundary is not None}
        found: list[tuple[list[float], list[float] | None]] = [([], [] if self._has_reference else None)] * len(tries)
        done = len(before) + len(tries) - len(numbered)
        for row, batch in self._rows(numbered):
            where, tokens = batch.counts.node, batch.counts.option
            sizes = [len(numbered[i].rejections) for i in row]
            own, base = (
                None if states is None else token_nlls(states[where], self._head, tokens).double().cpu().split(sizes)
                for states in self._states(batch)
            )
            assert own is not None
            for number, i in enumerate(row):
                found[i] = own[number].tolist(), None if base is None else base[number].tolist()
            done += len(row)
            if on_done is not None:
                on_done(done)
        return found

    def _rows(self, numbered: dict[int, Boundary]) -> Iterator[tuple[list[int], Batch]]:
        """Boundaries in batches, shortest first, each with the numbers of what is in it."""
        order = sorted(numbered, key=lambda i: numbered[i].size)
        device = plain_model(self.model).device
        for row in bin_pack(order, lambda i: numbered[i].size, micro_batch_tokens(self.model)):
            yield row, make_batch(self._layout, [numbered[i] for i in row], EVERY_TOKEN).to(device)

    def _states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        with eval_mode(self.model), torch.no_grad():
            hidden = forward_hidden(backbone(self.model), batch)
        return hidden, reference_hidden(self.model, batch) if self._has_reference else None


class EngineScorer:
    """Anything that runs as an engine: log-probabilities of tokens, and no more.

    Args:
        engine: opened by the caller, and closed by it.
        max_length: most tokens of a prompt and one answer, or of a text; no more than the engine's context.
    """

    def __init__(self, engine: Engine, max_length: int) -> None:
        self.engine, self.max_length = engine, max_length

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """See `Scorer.answers`."""
        scores: list[list[AnswerScore]] = []
        for prompt, answers in questions:
            before = self.engine.prompt_ids(as_messages(prompt))
            room = max(0, self.max_length - len(before))
            encoded = [self.engine.tokenize(answer) for answer in answers]
            kept = [ids[:room] for ids in encoded]
            asked = [k for k, ids in enumerate(kept) if ids]
            found = dict.fromkeys(range(len(answers)), 0.0)
            scored = self.engine.logprobs([before + kept[k] for k in asked], [len(before)] * len(asked))
            found |= {k: -sum(values) for k, values in zip(asked, scored, strict=True)}
            scores.append([AnswerScore(found[k], len(ids), None, len(encoded[k]) > room) for k, ids in enumerate(kept)])
            if on_done is not None:
                on_done(len(scores))
        return scores

    def texts(self, texts: Sequence[str], on_done: OnDone | None = None) -> list[TextScore | None]:
        """See `Scorer.texts`."""
        ids = [self.engine.tokenize(text, add_special=True, parse_special=False)[: self.max_length] for text in texts]
        asked = [i for i, sequence in enumerate(ids) if len(sequence) > 1]
        scores: list[TextScore | None] = [None] * len(texts)
        found = self.engine.logprobs([ids[i] for i in asked], on_done=on_done)
        for i, values in zip(asked, found, strict=True):
            scores[i] = TextScore(-sum(values), len(values), None, None, None)
        return scores


def edges_of(boundary: Boundary) -> list[list[int]]:
    """The edges of a trie that each of its responses goes along, as numbers of the trie's `rejections`.

    Args:
        boundary: every token of its responses rejected.
    """
    number = {(node, token): edge for edge, (node, token, _) in enumerate(boundary.rejections)}
    return [[number[node, boundary.tokens[child - 1]] for node, child in boundary.steps(end)] for end in boundary.ends]


def _sum(values: Sequence[float], places: Sequence[int]) -> float:
    return sum(values[place] for place in places)


def _per_record(values: Tensor, batch: Batch, records: int) -> list[float]:
    """Sums of a value per node over each record's nodes."""
    sums = torch.zeros(records, dtype=torch.float64)
    return sums.index_add(0, batch.record.cpu(), values.double().cpu()).tolist()
