"""An answer's text as the model would write it after its prompt, and where its tokens stand in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from buleyean_rl.data.records import Spans


class AnswerText(NamedTuple):
    """An answer before it is tokenised.

    Args:
        text: of the answer.
        spans: its rejected [start, end) character ranges; none means all of it.
        token_ids: drawn by a model with the encoder's tokenizer.
        ended: whether the model came to its end; None where nobody knows.
    """

    text: str
    spans: Spans = ()
    token_ids: Sequence[int] | None = None
    ended: bool | None = None


class PreparedAnswer(NamedTuple):
    """An answer as it is tokenised.

    Args:
        text: with changes.
        spans: the rejected ranges in it, an empty tuple for nothing; None for all of it.
        notes: what was changed, in keys of `encode.COUNT_LABELS`.
    """

    text: str
    spans: Spans | None
    notes: tuple[str, ...]


def prepare_answer(
    answer: AnswerText, end_marks: Sequence[str], reasoning_tags: tuple[str, str] | None
) -> PreparedAnswer:
    """Take off what is no part of an answer, and fit it to a chat template that opens with reasoning.

    Args:
        answer: as somebody logged it.
        end_marks: the model's end-of-turn tokens.
        reasoning_tags: opening and closing tag of the reasoning with which every answer begins.
    """
    text = strip_end_marks(answer.text, end_marks)
    notes: tuple[str, ...] = ("end_marks",) if len(text) < len(answer.text) else ()
    text, shift = _fit_reasoning(text, answer.ended, reasoning_tags)
    if shift:
        notes += ("reasoning_closed",) if shift > 0 else ("reasoning_marks",)
    if not answer.spans:
        return PreparedAnswer(text, None if shift <= 0 else ((shift, len(text)),), notes)
    first = max(shift, 0)
    moved = ((max(start + shift, first), min(end + shift, len(text))) for start, end in answer.spans)
    return PreparedAnswer(text, tuple((start, end) for start, end in moved if start < end), notes)


def strip_end_marks(text: str, marks: Sequence[str]) -> str:
    """A text without the end-of-turn tokens at its end, and without the white space after them."""
    length = end = len(text)
    while length:
        if text[length - 1].isspace():
            length -= 1
            continue
        mark = next((mark for mark in marks if text.endswith(mark, 0, length)), "")
        if not mark:
            break
        length -= len(mark)
        end = length
    return text[:end]


def reject_tokens(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token reaches into a span.

    Args:
        offsets: [start, end) characters of each token.
        spans: sorted, without overlaps.
    """
    ends = [end for _, end in spans]
    firsts = (bisect_right(ends, start) for start, _ in offsets)  # the first span that ends after the token's start
    return [i < len(spans) and spans[i][0] < end for i, (_, end) in zip(firsts, offsets, strict=True)]


def locate_drawn_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> list[tuple[int, int]] | None:
    """The [start, end) characters of drawn tokens in their answer's text; None if they are of another text.

    Args:
        tokenizer: of transformers, a fast one.
        ids: as drawn.
        text: what was made of them.
    """
    from tokenizers.decoders import DecodeStream

    backend, vocabulary = tokenizer.backend_tokenizer, len(tokenizer)
    if not all(0 <= token < vocabulary for token in ids):
        return None
    stream, offsets, written, pending = DecodeStream(skip_special_tokens=True), [], 0, 0
    for token in ids:
        pending += 1
        if piece := stream.step(backend, token):
            if not text.startswith(piece, written):
                return None
            offsets += [(written, written + len(piece))] * pending
            written, pending = written + len(piece), 0
    unfinished = text[written:]  # of a character whose last bytes were never drawn
    if unfinished.strip("\N{REPLACEMENT CHARACTER}"):
        return None
    last = (written, len(text)) if unfinished or not offsets else offsets[-1]
    return offsets + [last] * pending


def _fit_reasoning(text: str, ended: bool | None, tags: tuple[str, str] | None) -> tuple[str, int]:
    """A text after a chat template that opens the reasoning, and by how much its characters have moved."""
    if tags is None or not text:
        return text, 0
    opening, closing = tags
    if text.lstrip().startswith(opening):
        fitting = text.lstrip()[len(opening) :].removeprefix("\n")
        return fitting, len(fitting) - len(text)
    if closing in text or ended is False:  # it begins with the reasoning
        return text, 0
    closed = f"\n{closing}\n\n"
    return closed + text, len(closed)
