"""Just enough of Go's text/template, and of Ollama's Modelfile, to render what our Modelfiles say.

Written from the documentation of both: actions between double braces; `if`, `else if`, `else`, `range`, `end`;
`eq` and `ne`; fields of the current item, variables, assignment, quoted strings. All else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def parse_modelfile(text: str) -> dict[str, list[str]]:
    """Instructions and their arguments, in order: NAME argument, the argument bare, quoted or in triple quotes."""
    found: dict[str, list[str]] = {}
    pattern = r'([A-Z]+) (?:"""(.*?)"""|((?:[a-z_]+ )?)"((?:[^"\\]|\\.)*)"|([^\n"]+))\n'
    at = 0
    while at < len(text):
        match = re.compile(pattern, re.DOTALL).match(text, at)
        assert match, f"not an instruction: {text[at : at + 40]!r}"
        name, block, word, quoted, bare = match.groups()
        value = block if block is not None else bare if quoted is None else word + re.sub(r"\\(.)", r"\1", quoted)
        found.setdefault(name, []).append(value)
        at = match.end()
    return found


def render_go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """A Go template over `.Messages`, each with `.Role` and `.Content`."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    tokens = [("text" if i % 2 == 0 else "action", part) for i, part in enumerate(parts)]
    nodes, rest = _block(tokens)
    assert not rest, f"left over: {rest[:1]}"
    variables: dict[str, Any] = {}
    data = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    return _run(nodes, data, variables)


def _block(tokens: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]]]:
    """Nodes up to an `else` or `end` of the block around them, and what is left."""
    nodes: list[Any] = []
    while tokens:
        (kind, text), *tokens = tokens
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text.split(" ")[0] == "else":
            return nodes, [(kind, text), *tokens]
        elif text.startswith("range "):
            body, tokens = _block(tokens)
            assert tokens[0] == ("action", "end")
            nodes.append(("range", text.removeprefix("range "), body))
            tokens = tokens[1:]
        elif text.startswith("if "):
            branches = []
            condition: str | None = text.removeprefix("if ")
            while True:
                body, tokens = _block(tokens)
                branches.append((condition, body))
                (_, closing), *tokens = tokens
                if closing == "end":
                    break
                assert closing.startswith("else")
                condition = closing.removeprefix("else if ") if closing != "else" else None
            nodes.append(("if", branches))
        else:
            nodes.append(("do", text))
    return nodes, []


def _run(nodes: list[Any], dot: Any, variables: dict[str, Any]) -> str:
    out = ""
    for kind, *rest in nodes:
        if kind == "text":
            out += rest[0]
        elif kind == "range":
            out += "".join(_run(rest[1], item, variables) for item in _value(rest[0], dot, variables))
        elif kind == "if":
            for condition, body in rest[0]:
                if condition is None or _holds(condition, dot, variables):
                    out += _run(body, dot, variables)
                    break
        elif match := re.fullmatch(r"(\$\w+) (:?=) (.+)", rest[0]):
            name, how, expression = match.groups()
            assert (how == ":=") is (name not in variables), f"{rest[0]}: declared twice or never"
            variables[name] = _value(expression, dot, variables)
        else:
            out += _value(rest[0], dot, variables)
    return out


def _holds(condition: str, dot: Any, variables: dict[str, Any]) -> bool:
    name, left, right = re.fullmatch(r'(eq|ne) (\S+) ("[^"]*"|\S+)', condition).groups()  # type: ignore[union-attr]
    same = _value(left, dot, variables) == _value(right, dot, variables)
    return same if name == "eq" else not same


def _value(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    if expression.startswith('"'):
        return expression[1:-1]
    return variables[expression] if expression.startswith("$") else dot[expression.removeprefix(".")]
