"""Chat templates that refuse, leave out, open the reasoning, or never end."""

from __future__ import annotations

import time
from typing import Any

import pytest

from buleyean_rl.data import chat_template
from buleyean_rl.data.answer_text import AnswerText
from buleyean_rl.data.chat_template import ChatTemplate, EndlessTemplate, TemplateRefusal
from buleyean_rl.data.encode import Encoder, describe_template, end_token_ids
from buleyean_rl.data.records import looks_rendered
from tiny import CHATML, tiny_tokenizer
from tiny_tokenizers import STRICT, character_bpe

THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- system messages


def test_a_system_message_without_a_place_is_folded_and_counted() -> None:
    drops_it = CHATML.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    for tokenizer in (character_bpe("never", STRICT), with_template(drops_it)):
        encoder = Encoder(tokenizer)
        folded, plain = encoder.encode_conversations([[SYSTEM, USER], [{"role": "user", "content": "Be brief.\n\nHi"}]])
        assert folded.ids == plain.ids
        assert encoder.counts["system_folded"] == 1


def test_a_template_with_a_place_for_it_gets_the_system_message() -> None:
    encoder = Encoder(tiny_tokenizer())
    encoder.encode_conversations([[SYSTEM, USER]])
    assert not +encoder.counts


def test_a_system_message_alone_cannot_be_folded() -> None:
    with pytest.raises(TemplateRefusal, match="no user message"):
        ChatTemplate(character_bpe("never", STRICT)).render([SYSTEM])


# --- refusals


def test_a_refusal_says_why_and_can_be_skipped() -> None:
    tokenizer = character_bpe("never", STRICT)
    with pytest.raises(TemplateRefusal, match=r"refuses it: Conversation roles must alternate; .* --skip-bad"):
        Encoder(tokenizer).encode_conversations([[USER, USER]])
    encoder = Encoder(tokenizer, skip_refused=True)
    refused, fine = encoder.encode([((("user", "Hi"), ("user", "Hi")), [AnswerText("No")]), ("Hi", [AnswerText("No")])])
    assert refused.prompt.refusal is not None
    assert not refused.answers
    assert fine.answers
    assert encoder.counts["refused_by_template"] == 1


def test_a_template_that_fails_in_any_way_refuses() -> None:
    for template in ("{{ messages[7].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateRefusal, match="refuses it"):
            ChatTemplate(with_template(template)).render([USER])


def test_no_message_is_left_out() -> None:
    template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="leaves out messages of the role 'tool'"):
        ChatTemplate(with_template(template)).render([USER, {"role": "tool", "content": "42"}, USER])


# --- hostile templates


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{% for i in range(99999) %}{{ messages | length }}{% endfor %}{% endmacro %}"
        "{% for i in range(9999) %}{{ again() }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    for messages in ([USER], [SYSTEM, USER]):
        with pytest.raises(EndlessTemplate, match=r"has not ended after 0.2 s"):
            ChatTemplate(with_template(template)).render(messages)
    with pytest.raises(EndlessTemplate):
        Encoder(with_template(template), skip_refused=True)


def test_a_template_that_writes_too_much_is_refused() -> None:
    template = "{% for i in range(50) %}{{ 'x' * 99999 }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="makes 4,999,950 characters of 2"):
        ChatTemplate(with_template(template)).render([USER])


# --- reasoning


def test_an_answer_without_reasoning_is_put_behind_an_empty_one() -> None:
    tokenizer = with_template(THINKING)
    tokenizer.add_tokens(["<think>", "</think>"])
    encoder = Encoder(tokenizer)

    def rejected(text: str, spans: Any = (), ended: bool | None = None) -> tuple[str, str]:
        (question,) = encoder.encode([("Hi", [AnswerText(text, spans, None, ended)])])
        (answer,) = question.answers
        assert tokenizer.decode(question.prompt.ids) == ChatTemplate(tokenizer).render([USER])
        marked = [token for token, is_rejected in zip(answer.ids, answer.rejected, strict=True) if is_rejected]
        return tokenizer.decode(answer.ids), tokenizer.decode(marked)

    assert rejected("Paris.") == ("\n</think>\n\nParis.", "Paris.")
    assert rejected("Paris.", ((5, 6),)) == ("\n</think>\n\nParis.", ".")
    assert rejected("Hm\n</think>\nParis.") == ("Hm\n</think>\nParis.",) * 2
    assert rejected("<think>\nHm\n</think>\nParis.") == ("Hm\n</think>\nParis.",) * 2
    assert rejected("<think>\nHm\n</think>\nParis.", ((20, 25),))[1] == "Paris"
    assert rejected("Hm, hm, hm", ended=False) == ("Hm, hm, hm",) * 2  # cut in the middle of its reasoning
    assert dict(+encoder.counts) == {"reasoning_closed": 2, "reasoning_marks": 2}


def test_the_tags_of_the_reasoning_are_read_off_the_template() -> None:
    assert ChatTemplate(tiny_tokenizer()).open_reasoning is None
    assert ChatTemplate(with_template(THINKING)).open_reasoning == ("<think>", "</think>")
    brackets = THINKING.replace("<think>", "[THINK]")
    assert ChatTemplate(with_template(brackets)).open_reasoning == ("[THINK]", "[/THINK]")
    closed = THINKING.replace("<think>\n", "<think>\n\n</think>\n\n")
    assert ChatTemplate(with_template(closed)).open_reasoning is None


# --- what is said of a template


def test_an_end_token_that_is_not_eos_is_said_and_ends_answers() -> None:
    tokenizer = tiny_tokenizer()
    assert describe_template(tokenizer) == []
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = "<|endoftext|>"
    (note,) = describe_template(tokenizer)
    assert "<|im_end|>, which is not the tokenizer's EOS, <|endoftext|>" in note
    assert tokenizer.convert_ids_to_tokens(sorted(end_token_ids(tokenizer))) == ["<|endoftext|>", "<|im_end|>"]


def test_what_a_model_does_with_prompts_and_reasoning_is_said() -> None:
    assert "plain text" in describe_template(with_template(None))[0]  # type: ignore[arg-type]
    assert "begins every answer with <think>" in describe_template(with_template(THINKING))[0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", True),
        ("<s>[INST] Hi [/INST]", True),
        ("<bos><start_of_turn>user\nHi", True),
        ("<|begin_of_text|><|start_header_id|>user", True),
        ((("user", "<|user|>\nHi"),), True),
        (
            "Do it.\n\n### Instruction:\nName a bird.\n\n### Input:\nIn Kenya.\n\n### Response:\n",
            True,
        ),
        ("### Human: Name a bird.### Assistant:", True),
        ("A chat. USER: Name a bird. ASSISTANT:", True),
        ("What does <|im_start|> mean?", False),
        ("### Instruction:\nWhat does this heading mean?", False),
        ("Write a summary that ends in ### Response:", False),
        ("<s>old</s> is struck out", False),
    ],
)
def test_a_prompt_that_went_through_a_template_is_noticed(prompt: Any, expected: bool) -> None:
    assert looks_rendered(prompt) is expected


def test_noticing_it_takes_time_linear_in_the_space_before_a_prompt() -> None:
    space = " " * 20_000
    begin = time.process_time()
    assert not looks_rendered(space + "Hi")
    assert looks_rendered(f"{space}<s>{space}[INST] Hi")
    assert time.process_time() - begin < 1
