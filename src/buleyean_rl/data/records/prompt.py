"""A prompt: a text, or a conversation that does not end with the assistant."""

from __future__ import annotations

import re

from buleyean_rl.data.records.messages import Messages, parse_messages
from buleyean_rl.data.records.values import fail, parse_text

Prompt = str | Messages

# The beginning of a prompt that has been through a template: ChatML, Llama 2 and 3, Gemma, Zephyr and Phi, DeepSeek.
# Space is never given back (`*+`): time would be quadratic in it.
_RENDERED = re.compile(
    r"\s*+(<s>|<bos>|<\|begin_of_text\|>|<\uff5cbegin\u2581of\u2581sentence\uff5c>)?\s*+"
    r"(<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>|<\|(system|user|assistant)\|>|<\uff5cUser\uff5c>)"
)
# The cues of templates that are plain text, before a question and at the end: Alpaca, Guanaco, Vicuna.
_QUESTION_CUE = re.compile(r"### ?(Instruction|Human|User|Question)\b|(^|\s)(USER|Human): ")
_ANSWER_CUE = re.compile(r"(### ?(Response|Assistant|Answer|Output):?|(^|\s)(ASSISTANT|Assistant):)\s*\Z")


def parse_prompt(value: object) -> Prompt:
    """A prompt from JSON; a conversation of one user message becomes its text.

    Raises:
        UnsupportedContent: a conversation that is more than text.
        RecordError: empty, not text, or a conversation that ends with an answer.
    """
    if isinstance(value, list | tuple):
        messages = parse_messages(value, "prompt")
        if messages[-1][0] == "assistant":
            fail("the prompt ends with an assistant message: put a rejected answer into rejected_responses")
        if not any(content.strip() for _, content in messages):
            fail("the prompt is empty: every message is blank")
        return messages[0][1] if len(messages) == 1 and messages[0][0] == "user" else messages
    text = parse_text(value, "prompt")
    if not text.strip():
        fail("the prompt is empty: give the text the answers were for, or remove the record")
    return text


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a list of {"role", "content"} messages, for a chat template or an engine."""
    messages = (("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": role, "content": content} for role, content in messages]


def looks_rendered(prompt: Prompt) -> bool:
    """Whether a text of a prompt looks like the output of some chat template."""
    if isinstance(prompt, str):
        return _looks_rendered(prompt)
    return any(_looks_rendered(content) for _, content in prompt)


def _looks_rendered(text: str) -> bool:
    if _RENDERED.match(text):
        return True
    answer = _ANSWER_CUE.search(text, max(0, len(text) - 200))
    return answer is not None and _QUESTION_CUE.search(text, 0, answer.start()) is not None
