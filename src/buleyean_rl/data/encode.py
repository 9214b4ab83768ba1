"""Text to token ids: prompts through the chat template, answers as the model would write them after it.

    prompt --chat template--> marked text --> ids
    tail of the marked text + answer --> ids, less the tail's

People's text is tokenised as text: see `control_tokens`. An answer that the model itself drew keeps the ids drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from buleyean_rl.data.answer_text import (
    AnswerText,
    PreparedAnswer,
    locate_drawn_tokens,
    prepare_answer,
    reject_tokens,
)
from buleyean_rl.data.chat_template import ChatTemplate, Messages, TemplateRefusal
from buleyean_rl.data.control_tokens import ControlTokens, TokenizedText, tail
from buleyean_rl.data.records import Prompt, RejectionRecord, as_messages, looks_rendered
from buleyean_rl.data.records.validation import Measure, MeasuredRecord

NO_LIMIT = 1 << 40
TAIL_TOKENS = 256  # more than a tail can have

# What `Encoder.counts` counts, for reports.
COUNT_LABELS = {
    "end_marks": "answers whose end-of-turn tokens, written as text, were taken off",
    "control_tokens_in_answers": "answers that spell control tokens of the model: read as text",
    "control_tokens_in_prompts": (
        "prompts that spell a chat template's tokens: read as text; where a template was applied to them already, "
        "give `messages` or the bare question instead"
    ),
    "system_folded": "system messages put before the first user message: the chat template has no place for them",
    "no_room": "records left out because the prompt leaves no room for an answer",
    "nothing_rejected": "records left out because no token of their answers is left: empty answers, or cut off",
    "refused_by_template": "records left out because the chat template refuses them",
    "reasoning_closed": "answers put behind the reasoning that the chat template opens, closed at once",
    "reasoning_marks": "answers whose opening reasoning tag was taken off: the chat template writes it",
    "drawn_ids": "answers with the token ids that the model drew",
    "drawn_ids_unused": "answers whose drawn token ids are another tokenizer's or another text's: their text is used",
}


class EncodedPrompt(NamedTuple):
    """A prompt in tokens, up to where the answer begins.

    Args:
        ids: of a prompt that is too long only the first ones.
        length: number of tokens.
        tail: the end of its marked text.
        refusal: of the chat template, instead of all of this.
    """

    ids: list[int]
    length: int = 0
    tail: str = ""
    refusal: TemplateRefusal | None = None


class EncodedAnswer(NamedTuple):
    """An answer in tokens.

    Args:
        ids: of an answer that is too long only the first ones.
        rejected: which of them are rejected. A token that reaches into a span is.
        length: number of tokens, estimated where the answer is far too long.
    """

    ids: list[int]
    rejected: list[bool]
    length: int


class EncodedQuestion(NamedTuple):
    """A prompt and its answers; no answers where the prompt leaves no room or was refused."""

    prompt: EncodedPrompt
    answers: list[EncodedAnswer]


class Encoder:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: a fast one of transformers.
        max_length: tokens of a prompt and an answer together; texts that are longer are not tokenised to their end.
        skip_refused: return what the chat template refuses, with its refusal, instead of raising it.

    Attributes:
        counts: what was changed or noticed, by the keys of `COUNT_LABELS`.

    Raises:
        ModelError: the tokenizer is no fast one.
    """

    def __init__(self, tokenizer: Any, max_length: int = NO_LIMIT, *, skip_refused: bool = False) -> None:
        self.max_length, self.counts = max_length, Counter[str]()
        self._skip_refused, self._tokenizer = skip_refused, tokenizer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
        turns = self._template.turns if self._template else ""
        self._control = ControlTokens(tokenizer, turns)
        self._end_marks = find_end_marks(tokenizer, self._template)
        self._end_ids = set(tokenizer.convert_tokens_to_ids(self._end_marks))
        self._end_id = find_end_id(tokenizer, self._template)
        self._reasoning_tags = self._template.open_reasoning if self._template else None
        self._hash = tokenizer_hash(tokenizer)
        self._tail_ids: dict[str, list[int]] = {}

    def encode_records(self, records: Sequence[RejectionRecord]) -> list[EncodedQuestion]:
        """Records, see `encode`; an accepted answer that came to its end goes on with the token that ends it."""
        questions = self.encode([(record.prompt, self._answers(record)) for record in records])
        return [self._add_ends(*pair) for pair in zip(records, questions, strict=True)]

    def encode(self, questions: Sequence[tuple[Prompt, Sequence[AnswerText]]]) -> list[EncodedQuestion]:
        """Prompts and their answers, so few that all their token ids fit in memory.

        Raises:
            TemplateRefusal: unless refusals are skipped.
        """
        prompts = self.encode_prompts([prompt for prompt, _ in questions])
        pairs = [
            (prompt.tail, answer)
            for prompt, (_, answers) in zip(prompts, questions, strict=True)
            if self.has_room(prompt)
            for answer in answers
        ]
        encoded = iter(self._encode_answers(pairs))
        return [
            EncodedQuestion(prompt, [next(encoded) for _ in answers] if self.has_room(prompt) else [])
            for prompt, (_, answers) in zip(prompts, questions, strict=True)
        ]

    def has_room(self, prompt: EncodedPrompt) -> bool:
        """Whether a prompt leaves room for an answer."""
        return 0 < prompt.length < self.max_length

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Prompts, up to where the model's answer begins.

        Raises:
            TemplateRefusal: unless refusals are skipped.
        """
        if self._template is not None:
            return self.encode_conversations([as_messages(prompt) for prompt in prompts])
        self._count_prompts([as_messages(prompt) for prompt in prompts])
        return self._encode_marked([_join_messages(prompt) for prompt in prompts], self._control.prefix)

    def encode_conversations(self, conversations: Sequence[Messages]) -> list[EncodedPrompt]:
        """Prompts as messages, by the chat template; see `encode_prompts`."""
        self._count_prompts(conversations)
        return self._encode_marked(self._render(conversations), prefix=[])

    def encode_text(self, text: str) -> list[int]:
        """A text that is no conversation, with BOS where the tokenizer adds it."""
        return [*self._control.prefix, *self._control.encode([text], self.max_length)[0].ids][: self.max_length]

    def _answers(self, record: RejectionRecord) -> list[AnswerText]:
        """The answers of a record, with their drawn ids where they are this tokenizer's."""
        drawn = record.token_ids
        if record.tokenizer != self._hash:
            self.counts["drawn_ids_unused"] += sum(ids is not None for ids in drawn)
            drawn = (None,) * len(drawn)
        return list(map(AnswerText, record.rejected_responses, record.rejected_spans, drawn, record.ended))

    def _add_ends(self, record: RejectionRecord, question: EncodedQuestion) -> EncodedQuestion:
        """To end there was accepted too. After a rejected answer it says nothing."""
        answers = [
            EncodedAnswer([*answer.ids, self._end_id], [*answer.rejected, True], answer.length + 1)
            if ended and not count and self._end_id is not None and answer.length == len(answer.ids)
            else answer
            for answer, count, ended in zip(question.answers, record.rejection_counts, record.ended, strict=False)
        ]
        return question._replace(answers=answers)

    def _count_prompts(self, conversations: Iterable[Messages]) -> None:
        for messages in conversations:
            spells = any(next(self._control.spans(message["content"]), None) for message in messages)
            as_prompt = tuple((message["role"], message["content"]) for message in messages)
            self.counts["control_tokens_in_prompts"] += spells or looks_rendered(as_prompt)
            self.counts["system_folded"] += self._template is not None and self._template.needs_folding(messages)

    def _render(self, conversations: Sequence[Messages]) -> list[str | TemplateRefusal]:
        """Conversations as marked text."""
        assert self._template is not None
        protected = [
            [{**message, "content": self._control.protect(message["content"])} for message in messages]
            for messages in conversations
        ]
        rendered: list[str | TemplateRefusal] = []
        for text, messages in zip(self._template.render_all(protected), conversations, strict=True):
            if isinstance(text, TemplateRefusal):
                text.messages = messages
                if not self._skip_refused:
                    raise text
                self.counts["refused_by_template"] += 1
                rendered.append(text)
            else:
                rendered.append(self._control.mark(text))
        return rendered

    def _encode_marked(self, rendered: Sequence[str | TemplateRefusal], prefix: list[int]) -> list[EncodedPrompt]:
        texts = [text for text in rendered if isinstance(text, str)]
        tokenized = iter(self._control.encode(texts, self.max_length))
        return [
            EncodedPrompt([], refusal=text)
            if isinstance(text, TemplateRefusal)
            else _make_prompt(next(tokenized), prefix, text)
            for text in rendered
        ]

    def _encode_answers(self, pairs: Sequence[tuple[str, AnswerText]]) -> list[EncodedAnswer]:
        """Answers after the tails of their prompts."""
        results: list[EncodedAnswer | None] = [self._use_drawn_ids(answer) for _, answer in pairs]
        missing = [number for number, result in enumerate(results) if result is None]
        prepared = {number: self._prepare(pairs[number][1]) for number in missing}
        for with_spans in (False, True):
            numbers = [number for number in missing if (prepared[number].spans is not None) == with_spans]
            continued = self._continue([(pairs[n][0], prepared[n].text) for n in numbers], offsets=with_spans)
            for number, text in zip(numbers, continued, strict=True):
                spans = prepared[number].spans
                rejected = [True] * len(text.ids) if spans is None else reject_tokens(text.offsets, spans)
                results[number] = EncodedAnswer(text.ids, rejected, text.length)
        return [result for result in results if result is not None]

    def _use_drawn_ids(self, answer: AnswerText) -> EncodedAnswer | None:
        """An answer as its model drew it; None where it has no token ids or they are of another text."""
        if answer.token_ids is None:
            return None
        ids = list(answer.token_ids)
        while ids and ids[-1] in self._end_ids:
            ids.pop()
        offsets = locate_drawn_tokens(self._tokenizer, ids, answer.text)
        if offsets is None:
            self.counts["drawn_ids_unused"] += 1
            return None
        self.counts["drawn_ids"] += 1
        rejected = reject_tokens(offsets, answer.spans) if answer.spans else [True] * len(ids)
        return EncodedAnswer(ids, rejected, len(ids))

    def _prepare(self, answer: AnswerText) -> PreparedAnswer:
        prepared = prepare_answer(answer, self._end_marks, self._reasoning_tags)
        self.counts.update(prepared.notes)
        self.counts["control_tokens_in_answers"] += next(self._control.spans(prepared.text), None) is not None
        return prepared

    def _continue(self, pairs: Sequence[tuple[str, str]], *, offsets: bool) -> list[TokenizedText]:
        """Texts as the continuation of others: of each pair the tokens of the second.

        The tokens of both together begin with those of the first. Where they do not, because a token would reach over
        the boundary, the model has the first as it stands, and the second follows another text.
        """
        results: list[TokenizedText | None] = [None] * len(pairs)
        for neutral in (None, "\n", "a", "."):
            missing = [number for number, result in enumerate(results) if result is None]
            before = [pairs[number][0] if neutral is None else neutral for number in missing]
            joint = [first + pairs[number][1] for first, number in zip(before, missing, strict=True)]
            tokenized = self._control.encode(joint, self.max_length + TAIL_TOKENS, offsets=offsets)
            for number, first, text in zip(missing, before, tokenized, strict=True):
                first_ids = self._tail_tokens(first)
                if text.ids[: len(first_ids)] == first_ids:
                    results[number] = _drop_beginning(text, len(first_ids), len(first), self.max_length)
        alone = [number for number, result in enumerate(results) if result is None]
        tokenized = self._control.encode([pairs[number][1] for number in alone], self.max_length, offsets=offsets)
        for number, text in zip(alone, tokenized, strict=True):
            results[number] = _drop_beginning(text, 0, 0, self.max_length)
        return [result for result in results if result is not None]

    def _tail_tokens(self, text: str) -> list[int]:
        if text not in self._tail_ids:
            if len(self._tail_ids) >= 1024:
                self._tail_ids.clear()
            self._tail_ids[text] = self._control.encode([text], TAIL_TOKENS)[0].ids
        return self._tail_ids[text]


def make_measure(encoder: Encoder) -> Measure:
    """What `validate_records` measures a record by: as training would tokenise it.

    Args:
        encoder: of the model; it raises what the chat template refuses.
    """
    already_counted = ("no_room", "nothing_rejected", "refused_by_template")

    def measure(record: RejectionRecord) -> MeasuredRecord:
        encoder.counts.clear()
        (question,) = encoder.encode_records([record])
        notes = {COUNT_LABELS[key]: n for key, n in encoder.counts.items() if n and key not in already_counted}
        return MeasuredRecord(
            question.prompt.length, [(answer.length, answer.rejected) for answer in question.answers], notes
        )

    return measure


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what token ids mean: of every token's id and text.

    Args:
        tokenizer: of transformers.
    """
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]


def find_end_marks(tokenizer: Any, template: ChatTemplate | None) -> list[str]:
    """The tokens that end an answer: those the chat template writes after one, and EOS."""
    end = template.answer_end if template is not None else ""
    marks = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content in end}
    marks |= {tokenizer.eos_token or ""}
    return sorted((mark for mark in marks if len(mark) > 1 and not mark.isspace()), key=len, reverse=True)


def find_end_id(tokenizer: Any, template: ChatTemplate | None) -> int | None:
    """The token that the chat template writes first after an answer, or EOS; None where there is neither."""
    end = template.answer_end.lstrip() if template is not None else ""
    mark = next((mark for mark in find_end_marks(tokenizer, template) if end.startswith(mark)), tokenizer.eos_token)
    return None if mark is None else int(tokenizer.convert_tokens_to_ids(mark))


def describe_template(tokenizer: Any) -> list[str]:
    """What a user should know of a model's chat template, in sentences.

    Args:
        tokenizer: a fast one of transformers.
    """
    if tokenizer.chat_template is None:
        return ["the tokenizer has no chat template: a prompt is its plain text"]
    notes, template = [], ChatTemplate(tokenizer)
    if template.open_reasoning:
        opening, closing = template.open_reasoning
        notes.append(
            f"the chat template begins every answer with {opening}: an answer without {closing} is put behind an empty "
            "reasoning, as the model itself would have to write it"
        )
    others = [mark for mark in find_end_marks(tokenizer, template) if mark in template.answer_end]
    if others and tokenizer.eos_token not in others:
        notes.append(
            f"the chat template ends answers with {', '.join(others)}, which is not the tokenizer's EOS, "
            f"{tokenizer.eos_token}: both end an answer"
        )
    return notes


def template_end_token(tokenizer: Any) -> int | None:
    """The first control token that the chat template writes after an answer, which need not be EOS; None without one.

    Args:
        tokenizer: a fast one of transformers.
    """
    if tokenizer.chat_template is None:
        return None
    template = ChatTemplate(tokenizer)
    marks = [mark for mark in find_end_marks(tokenizer, template) if mark in template.answer_end]
    return tokenizer.convert_tokens_to_ids(min(marks, key=template.answer_end.index)) if marks else None


def end_token_ids(tokenizer: Any) -> set[int]:
    """The ids of the tokens that end an answer: EOS, and those the chat template writes after one.

    Args:
        tokenizer: a fast one of transformers.
    """
    template = ChatTemplate(tokenizer) if tokenizer.chat_template is not None else None
    return set(tokenizer.convert_tokens_to_ids(find_end_marks(tokenizer, template)))


def _join_messages(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in as_messages(prompt)) + "\n\n"


def _make_prompt(tokenized: TokenizedText, prefix: list[int], text: str) -> EncodedPrompt:
    return EncodedPrompt([*prefix, *tokenized.ids], len(prefix) + tokenized.length, tail(text))


def _drop_beginning(text: TokenizedText, tokens: int, characters: int, limit: int) -> TokenizedText:
    """A tokenised text without its first tokens, and of the others so many as are wanted."""
    offsets = [(max(0, start - characters), end - characters) for start, end in text.offsets[tokens : tokens + limit]]
    return TokenizedText(text.ids[tokens : tokens + limit], offsets, text.length - tokens)
