"""A conversation out of JSON, as any tool writes it: its roles mapped to four, its content parts joined.

Training reads text alone. A message that is more than text (a call of a tool, an image) is refused with
`UnsupportedContent`, which importers count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from buleyean_rl.data.records.values import describe, fail, list_keys, parse_text
from buleyean_rl.errors import UnsupportedContent

Messages = tuple[tuple[str, str], ...]  # (role, content)

_SPELLINGS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "ai", "model", "chatbot", "chatgpt", "llm"),
    "tool": ("tool", "observation", "function", "functionresponse", "toolresponse", "toolresult", "ipython"),
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_CALLS = {"functioncall", "toolcall", "tooluse", "servertooluse", "mcpcall", "functioncalloutput"}
_REASONING = {"reasoning", "reasoningtext", "thinking", "redactedthinking", "think"}
_TEXT = {"text", "inputtext", "outputtext", "summarytext"}
_CONTENT_KEYS = ("content", "value", "text", "parts")
TOOL_CALL_IN_CONTEXT = "an earlier message calls a tool, which a text-only prompt cannot hold"


def parse_messages(value: object, name: str) -> Messages:
    """A conversation as (role, content) pairs.

    Args:
        value: a list of messages: {"role", "content"}, ShareGPT's {"from", "value"}, LangChain's wrapped ones. Content
            is text, or a list of text parts, which are joined; reasoning in it is left out.
        name: what to call it in an error.

    Raises:
        UnsupportedContent: a message calls a tool, or holds something other than text.
        RecordError: not such a list, empty, or a role that means none of system, user, assistant and tool.
    """
    if not isinstance(value, list | tuple) or not value:
        fail(f"{name} is {describe(value)}: it must be a list of messages with a role and a content")
    messages = [_parse_message(message, f"{name}[{i}]") for i, message in enumerate(value) if not is_reasoning(message)]
    return tuple(messages) or fail(f"{name} has no message but reasoning")


def _parse_message(message: object, name: str) -> tuple[str, str]:
    if isinstance(message, dict) and message.keys() == {"role", "content"}:
        role, content = message["role"], message["content"]
        if (
            isinstance(content, str) and isinstance(role, str) and role in _SPELLINGS
        ):  # most are: no other look is needed
            return role, parse_text(content, f"{name}.content")
    return parse_role(message, name), parse_content(message, name, TOOL_CALL_IN_CONTEXT)


def parse_role(message: object, name: str) -> str:
    """The role of a message: system, user, assistant or tool.

    Raises:
        RecordError: it has none, or one that means none of these.
    """
    role = _find_role(message, name)
    mapped = "assistant" if _simplify(role) in _CALLS else _ROLES.get(_simplify(role))
    return mapped or _refuse_role(role, name)


def parse_content(message: object, name: str, tool_call: str) -> str:
    """The text of a message.

    Args:
        message: with or without a role.
        name: what to call it in an error.
        tool_call: what to say where it calls a tool.

    Raises:
        UnsupportedContent: it calls a tool, or holds something other than text.
        RecordError: it has no text.
    """
    if isinstance(message, list | tuple):
        return parse_text(message[1], name)
    inner = _unwrap(message)
    if is_tool_call(message):
        raise UnsupportedContent(tool_call)
    content = next((inner[key] for key in _CONTENT_KEYS if inner.get(key) is not None), None)
    if content is None:
        fail(f"{name} has no content (its keys: {list_keys(inner)})")
    return join_parts(content, name, tool_call)


def join_parts(content: object, name: str, tool_call: str) -> str:
    """The text of a message's content: itself, or its text parts joined; reasoning is left out."""
    if isinstance(content, str):
        return parse_text(content, f"{name}.content")
    parts = content if isinstance(content, list | tuple) else [content]
    return "".join(_part_text(part, f"{name}.content", tool_call) for part in parts)


def is_tool_call(message: object) -> bool:
    """Whether a message, or a part of one, calls a tool or holds a tool's result as an item of its own."""
    if not isinstance(message, Mapping):
        return False
    inner = _unwrap(message)
    extra = inner.get("additional_kwargs")
    holders = [inner, *([extra] if isinstance(extra, Mapping) else [])]
    if any(holder.get(key) for holder in holders for key in ("tool_calls", "function_call", "tool_call")):
        return True
    return any(_simplify(inner.get(key)) in _CALLS for key in ("type", "role", "from"))


def is_reasoning(message: object) -> bool:
    """Whether a message, or a part of one, is reasoning and nothing else."""
    return isinstance(message, Mapping) and _simplify(message.get("type")) in _REASONING


def has_reasoning(messages: object) -> bool:
    """Whether the last message of a conversation comes with reasoning, as a message or as a part of its own."""
    if not isinstance(messages, list | tuple) or not messages:
        return False
    content = _unwrap(messages[-1]).get("content")
    parts = content if isinstance(content, list) else []
    return any(map(is_reasoning, [*messages[-2:-1], *parts]))


def is_message(value: object) -> bool:
    """Whether a value looks like a message: an object with a role and a content."""
    if not isinstance(value, Mapping):
        return False
    inner = _unwrap(value)
    has_role = any(isinstance(holder.get(key), str) for holder in (inner, value) for key in ("role", "from", "type"))
    return has_role and any(key in inner for key in (*_CONTENT_KEYS, "tool_calls", "function_call"))


def _unwrap(message: object) -> Mapping[str, Any]:
    """The object with a message's content: LangChain puts it into `kwargs` or `data`."""
    if not isinstance(message, Mapping):
        return {}
    return next((message[key] for key in ("kwargs", "data") if isinstance(message.get(key), Mapping)), message)


def _find_role(message: object, name: str) -> str:
    if isinstance(message, list | tuple) and len(message) == 2 and all(isinstance(item, str) for item in message):
        return str(message[0])
    if not isinstance(message, Mapping):
        fail(f'{name} is {describe(message)}: it must be {{"role": "user", "content": "..."}}')
    inner = _unwrap(message)
    path = message.get("id")  # LangChain: [..., "HumanMessage"]
    class_name = path[-1] if isinstance(path, list) and path else None
    names = (inner.get("role"), inner.get("from"), inner.get("type"), message.get("type"), class_name)
    role = next((role for role in names if isinstance(role, str) and role.strip() and role != "constructor"), None)
    return role or fail(f"{name} has no role (its keys: {list_keys(message)}): it must be {', '.join(_SPELLINGS)}")


def _refuse_role(role: str, name: str) -> NoReturn:
    others = ", ".join(spelling for role, spellings in _SPELLINGS.items() for spelling in spellings if spelling != role)
    fail(f"{name} has the role {role[:40]!r}: roles are {', '.join(_SPELLINGS)} (read as these: {others})")


def _simplify(role: object) -> str:
    """A role or type without case, separators and LangChain's endings."""
    if not isinstance(role, str):
        return ""
    word = role.strip().casefold().replace("_", "").replace("-", "").replace(" ", "")
    return word.removesuffix("chunk").removesuffix("message") or word


def _part_text(part: object, name: str, tool_call: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return parse_text(part, name)
    if not isinstance(part, Mapping):
        fail(f"{name} is {describe(part)}: it must be text, or a list of text parts")
    if is_reasoning(part):
        return ""
    if is_tool_call(part):
        raise UnsupportedContent(tool_call)
    kind = part.get("type")
    if isinstance(part.get("refusal"), str):
        return parse_text(part["refusal"], name)
    text = part.get("text")
    if isinstance(text, Mapping):  # OpenAI's assistants: {"value": ..., "annotations": ...}
        text = text.get("value")
    if text is None or (kind is not None and _simplify(kind) not in _TEXT):
        what = kind if isinstance(kind, str) else list_keys(part)
        raise UnsupportedContent(f"a message holds a part of the kind {what[:40]!r}; training reads text")
    return parse_text(text, name)
