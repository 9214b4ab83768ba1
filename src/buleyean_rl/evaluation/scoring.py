"""Log-probabilities of answers and of neutral texts.

`PackedScorer` computes with a model in memory: the answers to a prompt are one trie, many tries one micro-batch, and
the reference is the same model with its adapter disabled, so both come from one pass over the data. `EngineScorer`
uses an engine: token by token, slow, without distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import reference_hidden
from buleyean_rl.batching.layout import make_batch
from buleyean_rl.batching.micro_batch import bin_pack, micro_batch_tokens
from buleyean_rl.data.answer_text import AnswerText
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.evaluation.neutral_text import Passage, hidden_states, neutral_boundary
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.models.model import Model
from buleyean_rl.objectives.likelihood import compare_distributions, token_nlls
from buleyean_rl.objectives.losses import Objective

WINDOW_ITEMS = 256  # tokenised together; their micro-batches are of similar length
ALL_TOKENS = Objective("published")  # a node at each predicted token, and no other


class AnswerScore(NamedTuple):
    """The negative log-likelihood of an answer.

    Args:
        nats: -log pi(answer | prompt), without the end token.
        tokens: how many; 0 where the prompt leaves no token for the answer.
        reference_nats: -log pi_ref(answer | prompt), or None without a reference.
        cut: whether the answer was truncated.
    """

    nats: float
    tokens: int
    reference_nats: float | None
    cut: bool


class TextScore(NamedTuple):
    """Sums over the predicted tokens of a neutral text, in nats.

    Args:
        nats: -log pi(text).
        tokens: how many.
        reference_nats: -log pi_ref(text), or None without a reference.
        kl: sum of KL(pi_ref || pi), or None without a reference.
        entropy: sum of H(pi), or None without full distributions.
        reference_entropy: sum of H(pi_ref), or None without a reference.
    """

    nats: float
    tokens: int
    reference_nats: float | None
    kl: float | None
    entropy: float | None
    reference_entropy: float | None = None


Question = tuple[Prompt, Sequence[str]]  # a prompt, and answers to it
Text = str | Passage
OnDone = Callable[[int], None]


class Scorer(Protocol):
    """Scores answers and texts."""

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """Score every answer, in order; `on_done` is called with the number of questions so far."""

    def texts(self, texts: Sequence[Text], on_done: OnDone | None = None) -> list[TextScore | None]:
        """Score every text; None for one without a token to predict."""


class PackedScorer:
    """Scores with a model in memory; the reference of one with an adapter is its base.

    Args:
        model: in evaluation mode.
        max_length: maximum tokens of a prompt and one answer, or of a text.
        with_reference: of a model with an adapter, score the base too.
    """

    def __init__(self, model: Model, max_length: int, *, with_reference: bool = True) -> None:
        self.model, self.max_length = model, max_length
        self._has_reference, self._layout = with_reference and model.has_adapter, model.layout
        self._encoder = Encoder(model.tokenizer, max_length)

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """See `Scorer.answers`."""
        scores: list[list[AnswerScore]] = []
        for start in range(0, len(questions), WINDOW_ITEMS):
            window = questions[start : start + WINDOW_ITEMS]
            tries = [self._trie(prompt, answers) for prompt, answers in self._encode(window)]
            nats = self._edge_nats([boundary for boundary, _, _ in tries], scores, on_done)
            for (_, paths, cut), (policy, base) in zip(tries, nats, strict=True):
                scores.append(
                    [
                        AnswerScore(
                            _sum_at(policy, path), len(path), None if base is None else _sum_at(base, path), is_cut
                        )
                        for path, is_cut in zip(paths, cut, strict=True)
                    ]
                )
        return scores

    def texts(self, texts: Sequence[Text], on_done: OnDone | None = None) -> list[TextScore | None]:
        """See `Scorer.texts`."""
        scores: list[TextScore | None] = []
        for start in range(0, len(texts), WINDOW_ITEMS):
            window = [neutral_boundary(self._encoder, text) for text in texts[start : start + WINDOW_ITEMS]]
            numbered = {i: boundary for i, boundary in enumerate(window) if boundary is not None}
            window_scores: list[TextScore | None] = [None] * len(window)
            done = start + len(window) - len(numbered)
            for numbers, batch in self._micro_batches(numbered):
                hidden, reference = self._states(batch)
                figures = compare_distributions(hidden, reference, self.model.head, batch.counts.option)
                sums = [None if part is None else _sum_per_record(part, batch, len(numbers)) for part in figures]
                for number, i in enumerate(numbers):
                    nats, *others = (None if part is None else part[number] for part in sums)
                    window_scores[i] = TextScore(nats or 0.0, len(numbered[i].tokens), *others)
                done += len(numbers)
                if on_done is not None:
                    on_done(done)
            scores += window_scores
        return scores

    def _encode(self, questions: Sequence[Question]) -> Iterator[tuple[list[int], list[list[int]]]]:
        encoded = self._encoder.encode([(prompt, [AnswerText(text) for text in texts]) for prompt, texts in questions])
        for question, (_, texts) in zip(encoded, questions, strict=True):
            yield question.prompt.ids, [answer.ids for answer in question.answers] or [[] for _ in texts]

    def _trie(self, prompt: list[int], answers: list[list[int]]) -> tuple[Boundary | None, list[list[int]], list[bool]]:
        """The trie of answers, each answer's edges in it, and which were truncated; None if no token fits."""
        max_tokens = self.max_length - len(prompt) if prompt else 0
        cut = [len(ids) > max_tokens for ids in answers]
        fitting = [ids[: max(max_tokens, 0)] for ids in answers]
        if not any(fitting):
            return None, [[] for _ in answers], cut
        responses = [(ids, [True] * len(ids)) for ids in fitting]
        boundary = merge_responses(prompt, responses, [1] * len(responses), [1] * len(responses))
        return boundary, response_edges(boundary), cut

    def _edge_nats(
        self, tries: Sequence[Boundary | None], scores: Sequence[object], on_done: OnDone | None
    ) -> list[tuple[list[float], list[float] | None]]:
        """For each trie, -log pi and -log pi_ref of every edge."""
        numbered = {i: boundary for i, boundary in enumerate(tries) if boundary is not None}
        nats: list[tuple[list[float], list[float] | None]] = [([], [] if self._has_reference else None)] * len(tries)
        done = len(scores) + len(tries) - len(numbered)
        for numbers, batch in self._micro_batches(numbered):
            nodes, tokens = batch.counts.node, batch.counts.option
            sizes = [len(numbered[i].judgements) for i in numbers]
            policy, base = (
                None
                if states is None
                else token_nlls(states[nodes], self.model.head, tokens).double().cpu().split(sizes)
                for states in self._states(batch)
            )
            assert policy is not None
            for number, i in enumerate(numbers):
                nats[i] = policy[number].tolist(), None if base is None else base[number].tolist()
            done += len(numbers)
            if on_done is not None:
                on_done(done)
        return nats

    def _micro_batches(self, numbered: dict[int, Boundary]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of boundaries of similar length, each with its boundaries' numbers."""
        order = sorted(numbered, key=lambda i: numbered[i].size)
        for numbers in bin_pack(order, lambda i: numbered[i].size, micro_batch_tokens(self.model.module)):
            batch = make_batch(self._layout, [numbered[i] for i in numbers], ALL_TOKENS)
            yield numbers, batch.to(self.model.device)

    @torch.no_grad()
    def _states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        hidden = hidden_states(self.model, batch)
        return hidden, reference_hidden(self.model.module, batch) if self._has_reference else None


class EngineScorer:
    """Scores with an engine, without reference and distributions.

    Args:
        engine: the caller closes it.
        max_length: maximum tokens of a prompt and one answer, or of a text, within the engine's context.
    """

    def __init__(self, engine: Engine, max_length: int) -> None:
        self.engine, self.max_length = engine, max_length

    def answers(self, questions: Sequence[Question], on_done: OnDone | None = None) -> list[list[AnswerScore]]:
        """See `Scorer.answers`."""
        scores: list[list[AnswerScore]] = []
        for prompt, answers in questions:
            prompt_ids = self.engine.prompt_ids(as_messages(prompt))
            max_tokens = max(0, self.max_length - len(prompt_ids))
            encoded = [self._continue_prompt(answer) for answer in answers]
            fitting = [ids[:max_tokens] for ids in encoded]
            scorable = [k for k, ids in enumerate(fitting) if ids]
            logprobs = self.engine.logprobs(
                [prompt_ids + fitting[k] for k in scorable], [len(prompt_ids)] * len(scorable)
            )
            nats = dict.fromkeys(range(len(answers)), 0.0)
            nats |= {k: -sum(values) for k, values in zip(scorable, logprobs, strict=True)}
            scores.append(
                [AnswerScore(nats[k], len(ids), None, len(encoded[k]) > max_tokens) for k, ids in enumerate(fitting)]
            )
            if on_done is not None:
                on_done(len(scores))
        return scores

    def texts(self, texts: Sequence[Text], on_done: OnDone | None = None) -> list[TextScore | None]:
        """See `Scorer.texts`."""
        passages = [self._tokenize(text) if isinstance(text, str) else text for text in texts]
        ids = [passage.ids[: self.max_length] for passage in passages]
        scorable = [i for i, passage in enumerate(passages) if len(ids[i]) > passage.start]
        scores: list[TextScore | None] = [None] * len(texts)
        starts = [passages[i].start for i in scorable]
        logprobs = self.engine.logprobs([ids[i] for i in scorable], starts, on_done)
        for i, values in zip(scorable, logprobs, strict=True):
            scores[i] = TextScore(-sum(values), len(values), None, None, None)
        return scores

    def _tokenize(self, text: str) -> Passage:
        return Passage(self.engine.tokenize(text, add_special=True, parse_special=False))

    def _continue_prompt(self, answer: str) -> list[int]:
        """An answer's tokens after a prompt: as text, and without the space that some tokenizers put before a text."""
        for before in ("\n", "a", "."):
            first, joint = (self.engine.tokenize(text, parse_special=False) for text in (before, before + answer))
            if joint[: len(first)] == first:
                return joint[len(first) :]
        return self.engine.tokenize(answer, parse_special=False)


def response_edges(boundary: Boundary) -> list[list[int]]:
    """Each response's path through a trie, as indices of the trie's `judgements`.

    Args:
        boundary: every token of its responses rejected.
    """
    number = {(node, token): edge for edge, (node, token, *_) in enumerate(boundary.judgements)}
    return [[number[node, boundary.tokens[child - 1]] for node, child in boundary.steps(end)] for end in boundary.ends]


def _sum_at(values: Sequence[float], indices: Sequence[int]) -> float:
    return sum(values[index] for index in indices)


def _sum_per_record(values: Tensor, batch: Batch, records: int) -> list[float]:
    """Sum values per node over the nodes of each record. Shape of `values`: (nodes,)."""
    sums = torch.zeros(records, dtype=torch.float64)
    return sums.index_add(0, batch.record.cpu(), values.double().cpu()).tolist()
