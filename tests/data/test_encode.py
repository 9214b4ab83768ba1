"""Text to token ids: text stays text, answers continue their prompts, spans find their tokens, long texts are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.answer_text import AnswerText
from buleyean_rl.data.control_tokens import ControlTokens
from buleyean_rl.data.encode import EncodedAnswer, Encoder, tokenizer_hash
from buleyean_rl.data.records import Prompt, Spans, make_record
from tiny import SENTENCES, tiny_tokenizer
from tiny_tokenizers import STRICT, character_bpe, unigram

TOKENIZER = tiny_tokenizer()
BARE = tiny_tokenizer()
BARE.chat_template = None
TOKENIZERS = {
    "byte-level BPE": TOKENIZER,
    "Llama 2": character_bpe(),
    "Mistral": character_bpe("first"),
    "Gemma": character_bpe("never", STRICT),
    "Unigram": unigram(),
}
ENCODERS = {name: Encoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PIECES = [*"ab 1é🙂漢\n\r\t.<|>", "e\u0301", "\u00a0", "\r\n", " the", "Ignore", "👩‍👧", "\n\n", "  "]
CONTROL = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<unk>", "<end>", "<start>", "<|user|>", "<|endoftext|>"]

texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)
hostile_texts = st.lists(st.sampled_from([*PIECES, *CONTROL]), min_size=1, max_size=12).map("".join)
names = st.sampled_from(list(TOKENIZERS))


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    return Encoder(tokenizer).encode_prompts([prompt])[0].ids


def answer(encoder: Encoder, text: str, spans: Spans = (), prompt: Prompt = "Hi", **more: Any) -> EncodedAnswer:
    return encoder.encode([(prompt, [AnswerText(text, spans, **more)])])[0].answers[0]


def rendered(tokenizer: Any, prompt: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


# --- text is text


@given(names, hostile_texts, hostile_texts)
def test_no_text_makes_a_control_token(name: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # unknown characters are what <unk> is for
    (question,) = ENCODERS[name].encode([(f"{prompt}?", [AnswerText(f"{text}!")])])
    harmless = prompt_ids(tokenizer, "Hi?")
    assert [token for token in question.prompt.ids if token in control] == [i for i in harmless if i in control]
    assert not control & set(question.answers[0].ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_control_token_in_a_text_is_its_characters(name: str) -> None:
    tokenizer, encoder = TOKENIZERS[name], ENCODERS[name]
    text = f"say {tokenizer.eos_token} and {tokenizer.bos_token}, not {tokenizer.eos_token}x"
    ids = answer(encoder, text).ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


@given(names, texts)
def test_a_prompt_is_what_the_chat_template_makes_of_it(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = f"{prompt}?"
    expected = tokenizer(rendered(tokenizer, prompt), add_special_tokens=False).input_ids
    assert ENCODERS[name].encode_prompts([prompt])[0].ids == expected


def test_the_chat_template_wraps_the_prompt() -> None:
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, "Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    conversation = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in conversation)
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, conversation)) == text + "<|im_start|>assistant\n"


def test_without_a_template_the_prompt_is_its_text() -> None:
    assert prompt_ids(BARE, "Hi there") == BARE("Hi there").input_ids
    assert prompt_ids(BARE, (("system", "Be brief."), ("user", "Hi"))) == BARE("Be brief.\n\nHi\n\n").input_ids
    llama = character_bpe()
    llama.chat_template = None
    assert prompt_ids(llama, "Hi there") == llama("Hi there").input_ids
    assert prompt_ids(llama, "Hi</s>")[1:].count(llama.eos_token_id) == 0


def test_an_added_token_of_the_template_is_a_control_token_and_another_is_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<think>"])  # neither is marked special
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<turn>' + m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>assistant' }}{% endif %}"
    )
    turn, think = tokenizer.convert_tokens_to_ids(["<turn>", "<think>"])
    assert prompt_ids(tokenizer, "Hi <turn>").count(turn) == 2
    ids = answer(Encoder(tokenizer), "<think>No</think><turn>").ids
    assert think in ids
    assert turn not in ids


def test_an_ordinary_token_declared_special_stays_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    exclamation = tokenizer.convert_tokens_to_ids("!")
    assert answer(Encoder(tokenizer), "No!").ids[-1] == exclamation


# --- an answer continues its prompt


@given(names, texts, texts)
def test_an_answer_is_tokenised_as_after_its_prompt(name: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    (question,) = ENCODERS[name].encode([(f"{prompt}?", [AnswerText(text)])])
    before, ids = question.prompt.ids, question.answers[0].ids
    whole = rendered(tokenizer, f"{prompt}?") + text
    joint = tokenizer(whole, add_special_tokens=False).input_ids
    if joint[: len(before)] == before:
        assert before + ids == joint
    if tokenizer.unk_token_id not in joint:
        assert tokenizer.decode(before + ids) == tokenizer.decode(joint)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_space_is_put_before_an_answer(name: str) -> None:
    tokens = TOKENIZERS[name].convert_ids_to_tokens(answer(ENCODERS[name], "The dog.").ids)
    assert not tokens[0].startswith(("▁", "Ġ"))


def test_an_answer_after_a_prompt_it_would_merge_with_begins_with_its_own_token() -> None:
    prompt = "The capital of"  # without a template: " Fr" would follow, "Fr" alone is the same text
    for tokenizer in (BARE, TOKENIZER):
        ids = answer(Encoder(tokenizer), "\n\nNo", prompt=prompt).ids
        assert tokenizer.decode(ids) == "\n\nNo"


# --- spans


def rejected_text(text: str, *spans: tuple[int, int]) -> str:
    encoded = answer(ENCODERS["byte-level BPE"], text, spans)
    return TOKENIZER.decode([token for token, rejected in zip(encoded.ids, encoded.rejected, strict=True) if rejected])


def test_spans_are_characters_not_bytes() -> None:
    for text, part in (
        ("🙂🙂 yes", "🙂🙂"),  # four bytes and one character each: bytes would end in the middle
        ("cafe\u0301 or cafe\u0301?", "?"),  # e and its accent are two characters
        ("👩‍👧 1", "1"),
    ):
        start = text.rindex(part)
        assert rejected_text(text, (start, start + len(part))).strip() == part.strip()


def byte_ranges(ids: list[int]) -> list[tuple[int, int]]:
    """Where each token stands in the text's bytes; byte-level BPE writes a byte as a character."""
    ends = [0]
    for token in TOKENIZER.convert_ids_to_tokens(ids):
        ends.append(ends[-1] + len(token))
    return list(pairwise(ends))


def draw_spans(data: st.DataObject, text: str) -> Spans:
    """Some spans, sorted and apart, as records have them."""
    edges = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4)))
    return tuple(zip(edges[::2], edges[1::2], strict=False))


@given(hostile_texts, st.data())
def test_a_token_counts_exactly_if_it_reaches_into_a_span(text: str, data: st.DataObject) -> None:
    text += "."  # no end mark at the end
    spans = draw_spans(data, text)
    in_bytes = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    encoded = answer(ENCODERS["byte-level BPE"], text, spans)
    expected = [any(a < end and b > start for start, end in in_bytes) for a, b in byte_ranges(encoded.ids)]
    assert encoded.rejected == expected


@given(names, texts, st.data())
def test_every_character_of_a_span_is_in_a_rejected_token(name: str, text: str, data: st.DataObject) -> None:
    encoder, spans = ENCODERS[name], draw_spans(data, text)
    encoded = answer(encoder, text, spans)
    assert len(encoded.rejected) == len(encoded.ids) == len(answer(encoder, text).ids)
    for start, end in spans:  # one character alone marks no more tokens than its span does
        for place in range(start, end):
            alone = answer(encoder, text, ((place, place + 1),)).rejected
            assert any(alone) or not encoded.ids
            assert all(rejected for one, rejected in zip(alone, encoded.rejected, strict=True) if one)


def test_a_token_that_straddles_an_edge_counts() -> None:
    encoded = answer(ENCODERS["byte-level BPE"], "Paris", ((4, 5),))
    pieces = [TOKENIZER.decode([token]) for token in encoded.ids]
    assert len(pieces[-1]) > 1  # the last token begins before the span does
    assert encoded.rejected == [False] * (len(pieces) - 1) + [True]


def test_no_spans_reject_every_token() -> None:
    text = " ".join(SENTENCES)
    encoded = answer(ENCODERS["byte-level BPE"], text)
    assert encoded.ids == TOKENIZER(text, add_special_tokens=False).input_ids
    assert encoded.rejected == [True] * len(encoded.ids)
    assert answer(ENCODERS["byte-level BPE"], text, ((0, len(text)),)) == encoded


# --- end marks


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("byte-level BPE", "<|im_end|>"),
        ("byte-level BPE", "<|im_end|>\n"),
        ("byte-level BPE", "<|im_end|> <|im_end|>\n"),
        ("Llama 2", "</s>"),
        ("Gemma", "<end>\n"),
        ("Gemma", "<end></s>"),
    ],
)
def test_an_answers_end_marks_are_taken_off_and_counted(name: str, ending: str) -> None:
    encoder = Encoder(TOKENIZERS[name])
    assert answer(encoder, f"The dog.{ending}") == answer(encoder, "The dog.")
    assert answer(encoder, f"The dog.{ending}", ((4, 7),)) == answer(encoder, "The dog.", ((4, 7),))
    assert dict(+encoder.counts) == {"end_marks": 2}
    assert answer(encoder, ending).ids == []


def test_a_span_of_an_end_mark_alone_rejects_nothing() -> None:
    encoded = answer(Encoder(TOKENIZER), "The dog.<|im_end|>", ((8, 18),))
    assert not any(encoded.rejected)


def test_control_tokens_elsewhere_are_counted() -> None:
    encoder = Encoder(TOKENIZER)
    assert TOKENIZER.decode(answer(encoder, "a<|im_end|>b").ids) == "a<|im_end|>b"
    encoder.encode_prompts(["<|im_start|>user\nHi<|im_end|>\n", "[INST] Hi [/INST]", "Hi"])
    assert dict(+encoder.counts) == {"control_tokens_in_answers": 1, "control_tokens_in_prompts": 2}


# --- ids that were drawn


@given(names, texts, st.data())
def test_drawn_ids_are_taken_as_they_are(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    usual = answer(ENCODERS[name], text).ids
    drawn = [token for piece in text for token in tokenizer(piece, add_special_tokens=False).input_ids]
    for ids in (usual, drawn):
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        if not decoded:
            continue
        assert answer(ENCODERS[name], decoded, token_ids=ids).ids == ids
        spans = draw_spans(data, decoded)
        rejected = answer(ENCODERS[name], decoded, spans, token_ids=ids).rejected
        assert len(rejected) == len(ids)
        assert any(rejected)
        assert answer(ENCODERS[name], decoded, ((0, len(decoded)),), token_ids=ids).rejected.count(False) == 0


def test_drawn_ids_of_another_text_are_not_used() -> None:
    encoder = Encoder(TOKENIZER)
    ids = answer(encoder, "The dog.").ids
    for other in ("The dog", "The cat.", "The dog. Yes"):
        assert answer(encoder, other, token_ids=ids) == answer(encoder, other)
    assert answer(encoder, "The dog.", token_ids=[10**9]).ids == ids
    assert dict(+encoder.counts) == {"drawn_ids_unused": 4}


def test_an_accepted_answer_that_ended_goes_on_with_its_end() -> None:
    ended = [True, False, None, True]
    record = make_record("Hi", ["Ignore", "the", "a", "no"], [0, 0, 0, 1], 1, ended=ended)
    answers = ENCODERS["byte-level BPE"].encode_records([record])[0].answers
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert [given.ids[-1] == end for given in answers] == [True, False, False, False]
    assert answers[0].rejected == [True] * answers[0].length  # judged, to the end


def test_a_tokenizers_hash_is_of_its_ids_alone() -> None:
    assert tokenizer_hash(BARE) == tokenizer_hash(TOKENIZER)
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != tokenizer_hash(TOKENIZER) != tokenizer_hash(tiny_tokenizer("qwen2", vocab_size=390))


# --- long texts


@given(names, st.lists(st.sampled_from([*PIECES, *SENTENCES, "a" * 40, " " * 30]), min_size=10, max_size=60))
def test_the_beginning_of_a_long_text_has_the_tokens_of_the_whole(name: str, pieces: list[str]) -> None:
    text = "".join(pieces) * 20
    control = ControlTokens(TOKENIZERS[name])
    (whole,) = control.encode([text], 1 << 30, offsets=True)
    for limit in (1, 7, 40):
        (cut,) = control.encode([text], limit, offsets=True)
        assert cut.ids[:limit] == whole.ids[:limit]
        assert cut.offsets[:limit] == whole.offsets[:limit]


def test_a_long_answer_is_not_tokenised_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, lengths = Encoder(TOKENIZER, 64), []
    encode = encoder._control._backend.encode_batch_fast

    class Counting:
        def encode_batch_fast(self, pieces: list[str], **options: Any) -> Any:
            lengths.extend(map(len, pieces))
            return encode(pieces, **options)

    monkeypatch.setattr(encoder._control, "_backend", Counting())
    for long in ("The dog. " * 100_000, "🙂" * 100_000, "a" * 100_000):
        (question,) = encoder.encode([("Hi", [AnswerText(long)])])
        assert len(question.answers[0].ids) == 64
        assert 0.9 * len(long) / 9 < question.answers[0].length < 5 * len(long)
        (prompt,) = encoder.encode_prompts([long])
        assert prompt.length > 64
        assert not encoder.has_room(prompt)
    assert max(lengths) < 20_000
