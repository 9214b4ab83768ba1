"""What a run holds a model to while it learns: text that was not rejected, on which it keeps to its base.

passages that the base wrote from nothing ----------------+
                                                          +--> a step has some for each rejection
accepted answers of the records, or else the base's own --+

Passages come first: with one anchor for each rejection it is a passage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from buleyean_rl.data.encode import end_token_ids
from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.inference.own_text import own_continuations, own_passages
from buleyean_rl.models.model import Model
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset

MAX_ACCEPTED = 4096  # in memory
SEED = 1 << 20  # other passages than those that drift is measured on
PASSAGE_TOKENS, ANSWER_TOKENS = 80, 64  # of each: many short ones hold more than a few long ones, for the same time
PASSAGES, ANSWERS = 64, 32  # that the base writes


def anchor_groups(model: Model, dataset: Dataset, config: BuleyeanConfig) -> list[Sequence[Boundary]]:
    """The anchors of a run: passages, then answers; none where the objective has no reference.

    Args:
        model: the base, or one with an adapter, which is disabled.
        dataset: of the run.
        config: the settings.
    """
    if not config.anchors or not config.loss.uses_reference or config.loss.is_listwise:
        return []
    once, tokens = config.processes.once, min(PASSAGE_TOKENS, config.max_length)
    written = once(lambda: own_passages(model, PASSAGES, tokens, SEED))
    passages = [_anchor(ids[:1], [ids[1:]], judged=False) for ids in written]
    if config.anchors == 1:
        return [passages]
    chosen = np.random.default_rng(config.seed).permutation(len(dataset.anchors))[:MAX_ACCEPTED]
    accepted = [_shorten(boundary) for boundary in dataset.anchors.select(chosen)]
    if not accepted and not dataset.training.accepted_answers.any():
        accepted = _own_answers(model, dataset.training[:ANSWERS], config)
    return [passages, accepted]


def _own_answers(model: Model, boundaries: Sequence[Boundary], config: BuleyeanConfig) -> list[Boundary]:
    """What the base answers to prompts itself, but for answers that were rejected."""
    tokens, ends = min(ANSWER_TOKENS, config.max_length // 2), end_token_ids(model.tokenizer)
    fitting = [boundary for boundary in boundaries if len(boundary.prompt) + tokens <= config.max_length]
    prompts = [boundary.prompt for boundary in fitting]
    written = config.processes.once(lambda: own_continuations(model, prompts, tokens, SEED))
    anchors = []
    for boundary, ids in zip(fitting, written, strict=True):
        answer = [token for token in ids if token not in ends]
        if answer and answer != boundary.tokens[: len(answer)]:
            anchors.append(_anchor(boundary.prompt, [answer], judged=False))
    return anchors


def _shorten(boundary: Boundary) -> Boundary:
    """The first tokens of its accepted answers."""
    ends = sorted(boundary.accepted_ends)
    return _anchor(boundary.prompt, [boundary.path_tokens(end)[:ANSWER_TOKENS] for end in ends], judged=True)


def _anchor(prompt: list[int], answers: Sequence[list[int]], *, judged: bool) -> Boundary:
    """Answers that were accepted, or that nobody judged: with a prior mean below 1 only the first may rise."""
    responses = [(ids, [judged] * len(ids)) for ids in answers]
    return merge_responses(prompt, responses, [0] * len(answers), [1] * len(answers))
