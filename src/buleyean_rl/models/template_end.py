"""The token at which a model's own chat template ends an answer, which need not be the tokenizer's EOS."""

from __future__ import annotations

from typing import Any

_QUESTION, _ANSWER = "question-of-a-probe", "answer-of-a-probe"


def template_end_token(tokenizer: Any) -> int | None:
    """The control token that the chat template puts after an answer.

    Args:
        tokenizer: of transformers.

    Returns:
        Its id; None without a template, or where the template puts no control token there.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program that may raise anything; what renders chats reports it
        return None
    _, answer, end = text.rpartition(_ANSWER)
    ids = tokenizer(end.strip(), add_special_tokens=False, verbose=False)["input_ids"] if answer else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
