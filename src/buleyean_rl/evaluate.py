"""Measurements that need no judge: likelihoods of texts and rejections, and how much an answer loops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from buleyean_rl.boundary import Boundary, merge_responses
from buleyean_rl.losses import NodeLosses, Objective
from buleyean_rl.models import evaluating, output_head, plain_model
from buleyean_rl.trainer import batch_losses, choose_layout, make_batch

# A word, a punctuation mark, or one character of a script that puts no spaces between words
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
LOOPING = 0.3  # share of repeated 4-grams above which an answer loops
NGRAM = 4


def neutral_boundary(tokenizer: Any, text: str, max_length: int) -> Boundary | None:
    """A plain text in the shape of a boundary, each of its tokens but the first to be predicted.

    Args:
        tokenizer: a transformers tokenizer.
        text: any.
        max_length: most tokens to use.

    Returns:
        The boundary, or None for a text of fewer than two tokens.
    """
    ids = list(tokenizer(text).input_ids)[:max_length]
    if len(ids) < 2:
        return None
    return merge_responses(ids[:1], [(ids[1:], [True] * (len(ids) - 1))], [1], 1)


def mean_nll(model: Any, boundaries: Sequence[Boundary], batch_size: int = 4) -> float:
    """Mean negative log-likelihood of what was rejected, in nats per token, each weighted by its rate.

    Args:
        model: PEFT or plain.
        boundaries: at least one; of plain texts, this is their nats per token.
        batch_size: boundaries in one forward pass.
    """
    total, weight = 0.0, 0.0
    # the contrast of the published objective is this very likelihood
    for losses, rate in _losses(model, boundaries, Objective("published"), batch_size):
        total += losses.contrast.sum().item()
        weight += rate
    return total / weight


def mean_losses(
    model: Any, boundaries: Sequence[Boundary], objective: Objective, batch_size: int = 4
) -> dict[str, float]:
    """The objective over some boundaries, dropout off: means of loss, kl, contrast and floor per node.

    Args:
        model: a PEFT model.
        boundaries: at least one.
        objective: which loss.
        batch_size: boundaries in one forward pass.
    """
    sums, nodes = torch.zeros(4, dtype=torch.float64), 0
    for losses, _ in _losses(model, boundaries, objective, batch_size):
        sums += torch.stack([part.double().sum().cpu() for part in losses])
        nodes += len(losses.loss)
    return dict(zip(NodeLosses._fields, (sums / nodes).tolist(), strict=True))


def _losses(
    model: Any, boundaries: Sequence[Boundary], objective: Objective, batch_size: int
) -> Iterator[tuple[NodeLosses, float]]:
    layout, head = choose_layout(model), output_head(model)
    for start in range(0, len(boundaries), batch_size):
        batch = make_batch(layout, boundaries[start : start + batch_size], objective).to(plain_model(model).device)
        with evaluating(model), torch.no_grad():
            losses = batch_losses(model, head, batch, objective)
        yield losses, batch.counts.rate.sum().item()


def repeated_spans(text: str) -> list[tuple[int, int]]:
    """Where a text repeats itself: the characters of every 4-gram that occurred before.

    A gram's units are words and single punctuation marks, so the measure is the same for every tokenizer.

    Args:
        text: an answer.

    Returns:
        Disjoint [start, end) spans in order.
    """
    spans: list[tuple[int, int]] = []
    for start, end, is_repeat in _grams(text):
        if not is_repeat:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def repetition(text: str) -> float:
    """Share of a text's 4-grams that occurred before in it, between 0 and 1."""
    repeats = [is_repeat for _, _, is_repeat in _grams(text)]
    return sum(repeats) / len(repeats) if repeats else 0.0


def is_looping(text: str) -> bool:
    """Whether more than 30% of a text's 4-grams are repeats."""
    return repetition(text) > LOOPING


def loop_rate(answers: Sequence[str]) -> float:
    """Share of answers that loop."""
    return sum(map(is_looping, answers)) / len(answers)


def _grams(text: str) -> Iterator[tuple[int, int, bool]]:
    """Each 4-gram: where it starts and ends, and whether it occurred before."""
    units = [(match.group().lower(), *match.span()) for match in UNIT.finditer(text)]
    seen = set()
    for window in zip(*(units[offset:] for offset in range(NGRAM)), strict=False):
        gram = tuple(unit for unit, _, _ in window)
        yield window[0][1], window[-1][2], gram in seen
        seen.add(gram)
