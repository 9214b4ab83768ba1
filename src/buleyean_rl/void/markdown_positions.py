"""Where in a Markdown source its text stands: what markdown-it-py parses and does not say.

A block's content is its lines without their prefixes (`> `, `- `), so that each content line is the end of its source
line; within it `PositionedState` notes where every token begins. Positions are those of the normalised source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

AT = "at"  # key of a token's meta: where in its block's content it begins
BLANKS = " \t"


class Leaf(NamedTuple):
    """A piece of shown text, and the range of the source that it is shown for.

    Args:
        text: as shown.
        start: of the range.
        end: of the range; the text is the range's own where both have the same length.
    """

    text: str
    start: int
    end: int


class PositionedState(StateInline):
    """Notes where each token begins."""

    _pending_at = 0

    def append_pending(self, text: str) -> None:
        """Add text that stands at `pos`."""
        if not self.pending:
            self._pending_at = self.pos
        super().append_pending(text)

    def pushPending(self) -> Token:  # noqa: N802 - the library's
        """Make a token of the pending text."""
        token = super().pushPending()
        token.meta = {AT: self._pending_at}
        return token

    def push(self, ttype: str, tag: str, nesting: Literal[-1, 0, 1]) -> Token:
        """Make a token at `pos`; a run of delimiters is made one by one before `pos` moves on."""
        if self.pending:
            self.pushPending()
        before = self.tokens[-1] if self.tokens else None
        token = super().push(ttype, tag, nesting)
        at = self.pos
        if before is not None and ttype == before.type == "text" and before.meta.get(AT, -1) >= at:
            at = before.meta[AT] + len(before.content)
        token.meta = {AT: at}
        return token


class PositionedInline(ParserInline):
    """The library's parser of a block's content, with positions."""

    def parse(self, src: str, md: MarkdownIt, env: Any, tokens: list[Token]) -> list[Token]:
        """See the library's, which makes a `StateInline`."""
        state = PositionedState(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


def normalise(text: str) -> tuple[str, Sequence[int]]:
    """A text as the parser reads it, and where each of its characters stood, with one more for the end."""
    source = re.sub(r"\r\n?", "\n", text).replace("\0", "\N{REPLACEMENT CHARACTER}")
    if "\r" not in text:
        return source, range(len(source) + 1)
    return source, [m.start() for m in re.finditer(r"\r\n?|[^\r]", text, re.DOTALL)] + [len(text)]


def text_positions(token: Token, opened: Token, lines: list[str], starts: list[int]) -> list[int] | None:
    """Where each character of a paragraph or a heading stands, and its end; None where that is unknown."""
    assert token.map is not None
    at: list[int] = []
    for number, line in enumerate(token.content.split("\n"), start=token.map[0]):
        body, words = lines[number], line.lstrip(BLANKS)
        if opened.markup.startswith("#"):
            body = re.sub(r"(?<=[ \t])#+[ \t]*$", "", body)
        found = body.rfind(words)
        if found < 0:
            return None
        begin, indent = starts[number] + found, len(line) - len(words)
        at += [max(starts[number], begin - indent + k) for k in range(indent)]
        at += range(begin, begin + len(words))
        at.append(starts[number] + len(lines[number]))  # the line's end
    return at


def cell_positions(token: Token, lines: list[str], starts: list[int], after: int) -> tuple[list[int] | None, int]:
    """The same of a table's cell, and where in the row the next one is to be sought."""
    assert token.map is not None
    line, content = lines[token.map[0]], token.content
    if not content:
        return [], after
    for match in re.compile(r"(?:\\\||[^|])+").finditer(line, after):
        at = [index for index in range(*match.span()) if line[index : index + 2] != "\\|"]
        shown = "".join(line[index] for index in at)
        if shown.strip() == content or (after == 0 and shown.rstrip().endswith(content)):
            begin = shown.rindex(content)
            return [starts[token.map[0]] + index for index in at[begin : begin + len(content)]], match.end()
    return None, after


def code_leaves(token: Token, lines: list[str], starts: list[int]) -> list[Leaf]:
    """The leaves of a block of code."""
    assert token.map is not None
    leaves: list[Leaf] = []
    if not token.content:
        return leaves
    number = token.map[0] + (token.type == "fence")
    for line in token.content.removesuffix("\n").split("\n"):
        if leaves:  # the end of the line before
            end = starts[number] - 1
            leaves.append(Leaf("\n", end, end + 1))
        words = line if lines[number].endswith(line) else line.lstrip(" ")
        begin = starts[number] + len(lines[number]) - len(words)
        if len(words) < len(line):  # what is left of a tab
            leaves.append(Leaf(line[: len(line) - len(words)], begin - 1, begin))
        leaves.append(Leaf(words, begin, begin + len(words)))
        number += 1
    return [leaf for leaf in leaves if leaf.text]


def inline_leaves(token: Token, at: Sequence[int] | None, source: str) -> Iterator[tuple[Token, list[Leaf]]]:
    """The parts of a block's content, each with its leaves; a part without any opens, closes or breaks."""
    if at is None:  # all of it is one piece
        yield token, [Leaf(token.content, *_whole(token, source))]
        return
    for child in token.children or []:
        yield child, [leaf for leaf in _child_leaves(child, at, source) if leaf.text]


def _child_leaves(child: Token, at: Sequence[int], source: str) -> Iterator[Leaf]:
    begin = child.meta.get(AT, 0)
    if child.type == "softbreak":
        yield Leaf("\n", at[begin], at[begin] + 1)
    elif child.type == "text_special" and child.content != child.markup:
        yield Leaf(child.content, at[begin], at[begin + len(child.markup) - 1] + 1)
    elif child.type in ("text", "text_special"):
        yield from _runs(child.content, at, begin, source)
    elif child.type == "code_inline":
        begin += len(child.markup)
        shown = "".join(source[index] for index in at[begin : begin + len(child.content)]).replace("\n", " ")
        yield from _runs(child.content, at, begin if shown == child.content else begin + 1, source)


def _runs(text: str, at: Sequence[int], begin: int, source: str) -> Iterator[Leaf]:
    """A text as pieces that stand together in the source."""
    if not text:  # a delimiter that was used
        return
    if source[at[begin]] == "<" and not text.startswith("<"):  # an address in angle brackets
        begin += 1
    positions = at[begin : begin + len(text)]
    shown = "".join(source[index] for index in positions).replace("\n", " ")
    if shown != text.replace("\n", " "):
        is_address = source[at[begin] - 1] == "<"  # shown as it is read; the others hold what is left of a tab
        yield Leaf(text, at[begin], source.index(">", at[begin]) if is_address else positions[-1] + 1)
        return
    low = 0
    for high in range(1, len(positions) + 1):
        if high == len(positions) or positions[high] != positions[high - 1] + 1:
            yield Leaf(text[low:high], positions[low], positions[high - 1] + 1)
            low = high


def _whole(token: Token, source: str) -> tuple[int, int]:
    """The lines of a block."""
    assert token.map is not None
    lines = source.split("\n")
    start = sum(len(line) + 1 for line in lines[: token.map[0]])
    return start, start + len("\n".join(lines[slice(*token.map)]))
