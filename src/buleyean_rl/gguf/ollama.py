"""A Modelfile for Ollama: the file, its chat template in Go's language, and where an answer ends.

A chat template is a Jinja program; Ollama renders Go templates. Rather than translate the program, `separators`
finds out what it does: the text it puts between one message and the next, for every pair of roles. That is all
there is to most of them (ChatML, Llama 2 and 3, Gemma, Mistral, Phi, Zephyr), and whether it is all there is to
this one is found by rendering conversations both ways. A template that does more is not written down wrong; it is
left out, and the reason given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.vocabulary import added_ends

Messages = Sequence[Mapping[str, str]]
START, ANSWER = "", "answer"  # before the first message, and where the model begins
ROLES = ("system", "user", "assistant")

# What a conversation can go through: enough of them to see every pair of neighbours, with and without a system message.
_PROBES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)
_CHECKS: tuple[tuple[str, ...], ...] = (
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


def separators(tokenizer: Any) -> dict[tuple[str, str], str]:
    """The text between neighbouring messages, by their roles; `START` and `ANSWER` stand at the two ends.

    Raises:
        ExportError: the chat template does more than put text between messages, or there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ExportError("the tokenizer has no chat template")
    found: dict[tuple[str, str], str] = {}
    accepted = [roles for roles in _PROBES if _rendered(tokenizer, roles) is not None]
    if ("user",) not in accepted:
        raise ExportError("the chat template refuses a single question")
    for roles in accepted:
        rest = str(_rendered(tokenizer, roles))
        for previous, (index, role) in zip((START, *roles), enumerate(roles), strict=False):
            before, mark, rest = rest.partition(_content(index))
            if not mark:
                raise ExportError("the chat template rewrites or leaves out what is said")
            _same(found, (previous, role), before)
        _same(found, (roles[-1], ANSWER), rest)
    for roles in _CHECKS:
        expected = _rendered(tokenizer, roles)
        if expected is not None and render(found, _messages(roles)) != expected:
            raise ExportError("the chat template depends on more than the roles of neighbouring messages")
    if added_ends(tokenizer)[0] and tokenizer.bos_token:  # llama.cpp adds BOS itself
        for key, text in found.items():
            if key[0] == START:
                found[key] = text.removeprefix(tokenizer.bos_token)
    return found


def render(found: Mapping[tuple[str, str], str], messages: Messages) -> str:
    """A conversation that ends in a question, by its separators."""
    text, previous = "", START
    for message in messages:
        text += found[previous, message["role"]] + message["content"]
        previous = message["role"]
    return text + found[previous, ANSWER]


def go_template(found: Mapping[tuple[str, str], str]) -> str:
    """Separators as a Go template, in the terms Ollama gives it: `.Messages` with `.Role` and `.Content`."""
    branches: list[str] = []
    for role in (role for role in ROLES if any(key[1] == role for key in found)):
        texts = {previous: text for (previous, later), text in found.items() if later == role}
        word = "else if" if branches else "if"
        branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{_by_previous(texts)}{{{{ .Content }}}}')
    ends = {previous: text for (previous, later), text in found.items() if later == ANSWER}
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        + "".join(branches)
        + "{{ end }}{{ $last = .Role }}{{ end }}"
        + '{{ if ne $last "assistant" }}'
        + _by_previous(ends)
        + "{{ end }}"
    )


def modelfile(model: Path, tokenizer: Any, ends: Sequence[int], license: str | None = None) -> tuple[str, list[str]]:
    """The text of a Modelfile.

    Args:
        model: the GGUF file, in the same folder.
        tokenizer: of transformers.
        ends: tokens at which an answer ends.
        license: an SPDX identifier.

    Returns:
        The text, and what it leaves out, in sentences.
    """
    lines, notes = [f"FROM ./{model.name}"], []
    try:
        template = go_template(separators(tokenizer))
        if '"""' in template:
            raise ExportError('the chat template holds """, which a Modelfile cannot')
        lines.append(f'TEMPLATE """{template}"""')
        if _trims(tokenizer):
            notes.append("the chat template trims what is said; the Modelfile's cannot, so leave no spaces around it")
    except ExportError as error:
        notes.append(
            f"the Modelfile has no TEMPLATE: {error}; Ollama will choose one by what it knows of the file's own, "
            "so compare `ollama show --template` with the model's documentation"
        )
    lines += [f'PARAMETER stop "{token}"' for token in _stops(tokenizer, ends)]
    if license is not None:
        lines.append(f'LICENSE "{license}"')
    return "\n".join(lines) + "\n", notes


def _stops(tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """The texts of the tokens that end an answer."""
    texts = tokenizer.convert_ids_to_tokens(sorted(ends))
    return [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]


def _by_previous(texts: Mapping[str, str]) -> str:
    """The text that the role before asks for; without a question where there is no choice."""
    usual = max(texts.values(), key=list(texts.values()).count)
    special = [(previous, text) for previous, text in texts.items() if text != usual]
    if not special:
        return _literal(usual)
    words = ["if", *["else if"] * (len(special) - 1)]
    chosen = (
        f'{{{{ {word} eq $last "{previous}" }}}}{_literal(text)}'
        for word, (previous, text) in zip(words, special, strict=True)
    )
    return "".join(chosen) + "{{ else }}" + _literal(usual) + "{{ end }}"


def _literal(text: str) -> str:
    """A text as a Go template writes it."""
    return text.replace("{{", '{{ "{{" }}')


def _content(index: int) -> str:
    """What is said in the i-th message of a probe: something no template has in it."""
    return f"message-{index}-of-a-probe"


def _messages(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": _content(index)} for index, role in enumerate(roles)]


def _rendered(tokenizer: Any, roles: Sequence[str]) -> str | None:
    """A probe as the tokenizer renders it; None where its template refuses."""
    try:
        return tokenizer.apply_chat_template(_messages(roles), tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None


def _trims(tokenizer: Any) -> bool:
    """Whether a template takes spaces away at the ends of what is said."""
    message = {"role": "user", "content": f"  {_content(0)}  "}
    return message["content"] not in tokenizer.apply_chat_template([message], tokenize=False)


def _same(found: dict[tuple[str, str], str], key: tuple[str, str], text: str) -> None:
    """Note a separator, which must be what it was elsewhere."""
    if found.setdefault(key, text) != text:
        raise ExportError("the chat template depends on more than the roles of neighbouring messages")
