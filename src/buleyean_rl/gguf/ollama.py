"""A Modelfile for Ollama: the file, its chat template in Go's language, and where an answer ends.

    tokenizer --find_separators: rendered probes--> text between roles --go_template--> TEMPLATE

A chat template is a Jinja program; Ollama renders Go templates. The program is not translated: `find_separators` reads
off the text it puts between one message and the next, for every pair of roles, which is all that most of them do. A
template that does more renders other conversations differently; it is left out, and the reason given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.vocabulary import adds_bos_and_eos

Messages = Sequence[Mapping[str, str]]
Separators = Mapping[tuple[str, str], str]  # by the roles of the messages before and after

START, ANSWER = "", "answer"  # the "roles" before the first message and after the last
ROLES = ("system", "user", "assistant")

# Every pair of neighbouring roles, with and without a system message.
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


def make_modelfile(
    model: Path, tokenizer: Any, end_tokens: Sequence[int], license: str | None = None
) -> tuple[str, list[str]]:
    """The text of a Modelfile.

    Args:
        model: the GGUF file, in the same folder.
        tokenizer: of transformers.
        end_tokens: at which an answer ends.
        license: an SPDX identifier.

    Returns:
        The text, and what it leaves out, in sentences.

    Raises:
        ExportError: a Modelfile cannot hold the file's name.
    """
    if not model.name.isprintable():
        raise ExportError(f"{model.name!r} cannot stand in a Modelfile: name a file without line breaks")
    lines, notes = [f"FROM ./{model.name}"], []
    try:
        template = go_template(find_separators(tokenizer))
        if '"""' in template:
            raise ExportError('the chat template holds """, which a Modelfile cannot')
        lines.append(f'TEMPLATE """{template}"""')
        if _trims(tokenizer):
            notes.append("the chat template trims messages; the Modelfile's cannot, so leave no spaces around them")
    except ExportError as error:
        notes.append(
            f"the Modelfile has no TEMPLATE: {error}; Ollama will choose one by what it knows of the file's own, "
            "so compare `ollama show --template` with the model's documentation"
        )
    for token in tokenizer.convert_ids_to_tokens(sorted(end_tokens)):
        escaped = token.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'PARAMETER stop "{escaped}"')
    if license is not None:
        lines.append(f'LICENSE "{license}"')
    return "\n".join(lines) + "\n", notes


def find_separators(tokenizer: Any) -> dict[tuple[str, str], str]:
    """The text between neighbouring messages, by their roles; `START` and `ANSWER` stand at the two ends.

    Raises:
        ExportError: the chat template does more than put text between messages, or there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ExportError("the tokenizer has no chat template")
    separators: dict[tuple[str, str], str] = {}
    accepted = [roles for roles in _PROBES if _render_probe(tokenizer, roles) is not None]
    if ("user",) not in accepted:
        raise ExportError("the chat template refuses a single question")
    for roles in accepted:
        remaining = str(_render_probe(tokenizer, roles))
        for previous, (index, role) in zip((START, *roles), enumerate(roles), strict=False):
            separator, content, remaining = remaining.partition(_content(index))
            if not content:
                raise ExportError("the chat template rewrites or leaves out what is said")
            _add(separators, (previous, role), separator)
        _add(separators, (roles[-1], ANSWER), remaining)
    for roles in _CHECKS:
        expected = _render_probe(tokenizer, roles)
        if expected is not None and render(separators, _probe(roles)) != expected:
            raise ExportError("the chat template depends on more than the roles of neighbouring messages")
    if adds_bos_and_eos(tokenizer)[0] and tokenizer.bos_token:  # llama.cpp adds BOS itself
        for key, text in separators.items():
            if key[0] == START:
                separators[key] = text.removeprefix(tokenizer.bos_token)
    return separators


def render(separators: Separators, messages: Messages) -> str:
    """A conversation that ends in a question, by its separators."""
    text, previous = "", START
    for message in messages:
        text += separators[previous, message["role"]] + message["content"]
        previous = message["role"]
    return text + separators[previous, ANSWER]


def go_template(separators: Separators) -> str:
    """Separators as a Go template, in the terms Ollama gives it: `.Messages` with `.Role` and `.Content`."""
    branches: list[str] = []
    for role in (role for role in ROLES if any(key[1] == role for key in separators)):
        keyword = "else if" if branches else "if"
        branches.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{_before(separators, role)}{{{{ .Content }}}}')
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        + "".join(branches)
        + "{{ end }}{{ $last = .Role }}{{ end }}"
        + '{{ if ne $last "assistant" }}'
        + _before(separators, ANSWER)
        + "{{ end }}"
    )


def _before(separators: Separators, role: str) -> str:
    """The Go template of the text before a role's message: a condition where it depends on the role before it."""
    texts = {previous: text for (previous, following), text in separators.items() if following == role}
    default = max(texts.values(), key=list(texts.values()).count)
    exceptions = [(previous, text) for previous, text in texts.items() if text != default]
    if not exceptions:
        return _literal(default)
    keywords = ["if", *["else if"] * (len(exceptions) - 1)]
    branches = (
        f'{{{{ {keyword} eq $last "{previous}" }}}}{_literal(text)}'
        for keyword, (previous, text) in zip(keywords, exceptions, strict=True)
    )
    return "".join(branches) + "{{ else }}" + _literal(default) + "{{ end }}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _content(index: int) -> str:
    """The content of a probe's message: a text no template has in it."""
    return f"message-{index}-of-a-probe"


def _probe(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": _content(index)} for index, role in enumerate(roles)]


def _render_probe(tokenizer: Any, roles: Sequence[str]) -> str | None:
    """A probe as the tokenizer renders it; None where its template refuses."""
    try:
        return tokenizer.apply_chat_template(_probe(roles), tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None


def _trims(tokenizer: Any) -> bool:
    """Whether a template strips spaces around a message."""
    message = {"role": "user", "content": f"  {_content(0)}  "}
    return message["content"] not in tokenizer.apply_chat_template([message], tokenize=False)


def _add(separators: dict[tuple[str, str], str], key: tuple[str, str], text: str) -> None:
    """Add a separator, which must not differ from the same one elsewhere."""
    if separators.setdefault(key, text) != text:
        raise ExportError("the chat template depends on more than the roles of neighbouring messages")
