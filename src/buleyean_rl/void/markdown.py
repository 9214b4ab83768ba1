"""An answer's Markdown as HTML that is safe, and in which every piece of text says where in the answer it stands.

    answer --markdown-it-py, HTML off--> tokens with positions --render--> HTML --nh3--> HTML

Text stands in leaves, `<span data-from="12" data-to="17">words</span>`: characters of the answer. A leaf as long as its
range maps one to one; another (an entity, an escape) is one piece. `<del>` instead of `<span>` is a rejected part.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

from buleyean_rl.data.records import Spans
from buleyean_rl.void.markdown_positions import (
    Leaf,
    PositionedInline,
    cell_positions,
    code_leaves,
    inline_leaves,
    normalise,
    text_positions,
)

CACHED = 2_048  # rendered answers
PAGE_LEVEL = 3  # of the heading that an answer stands below
ALIGNMENTS = {f"text-align:{side}": f"align-{side}" for side in ("left", "center", "right")}
LEAF = {"data-from", "data-to"}
BLOCKS = {"p", "h4", "h5", "h6", "pre", "ul", "ol", "li", "blockquote", "hr"}
TABLES = {"table", "thead", "tbody", "tr", "th", "td"}
TAGS = BLOCKS | TABLES | {"a", "br", "code", "del", "em", "s", "span", "strong"}
ATTRIBUTES = {"a": {"href"}, "span": LEAF, "del": LEAF, "code": {"class"}, "th": {"class"}, "td": {"class"}}


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False})
    parser.inline = PositionedInline()
    parser.configure("commonmark", {"html": False}).enable(["table", "strikethrough"])
    # Pictures would be fetched, definitions of links are text that would not be seen.
    return parser.disable(["image", "reference", "html_block", "html_inline", "fragments_join", "text_join"])


_PARSER = _make_parser()


@lru_cache(CACHED)
def render(text: str, spans: Spans = ()) -> str:
    """An answer as HTML.

    Args:
        text: the answer.
        spans: its rejected parts, as [start, end) characters.
    """
    source, origins = normalise(text)
    return nh3.clean(
        "".join(_blocks(_level_headings(_PARSER.parse(source)), source, origins, spans)),
        tags=TAGS,
        attributes={**ATTRIBUTES, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def _level_headings(tokens: list[Token]) -> list[Token]:
    """Move headings below the page's own, none more than one level below the one before it."""
    level = PAGE_LEVEL
    for token in tokens:
        if token.type == "heading_open":
            level = min(PAGE_LEVEL + int(token.tag[1]), level + 1, 6)
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{level}"
    return tokens


def _blocks(tokens: list[Token], source: str, origins: Sequence[int], spans: Spans) -> Iterator[str]:
    lines, row = source.split("\n"), 0
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for index, token in enumerate(tokens):
        if token.type == "tr_open":
            row = 0  # where the cells of a row were found so far
        if token.type == "inline":
            opened = tokens[index - 1]
            if opened.tag in ("th", "td"):
                at, row = cell_positions(token, lines, starts, row)
            else:
                at = text_positions(token, opened, lines, starts)
            yield from _inline(token, at, source, origins, spans)
        elif token.type in ("fence", "code_block"):
            language = re.match(r"[\w+#.-]+", token.info)
            yield f'<pre><code class="language-{language[0]}">' if language else "<pre><code>"
            yield from _leaves(code_leaves(token, lines, starts), origins, spans)
            yield "</code></pre>"
        elif not token.hidden:
            yield _tag(token)


def _inline(token: Token, at: Sequence[int] | None, source: str, origins: Sequence[int], spans: Spans) -> Iterator[str]:
    for child, leaves in inline_leaves(token, at, source):
        if child.type == "code_inline":
            yield "<code>"
            yield from _leaves(leaves, origins, spans)
            yield "</code>"
        elif child.type == "hardbreak":
            yield "<br>"
        elif leaves:
            yield from _leaves(leaves, origins, spans)
        elif child.nesting:
            yield _tag(child)


def _leaves(leaves: Sequence[Leaf], origins: Sequence[int], spans: Spans) -> Iterator[str]:
    for text, start, end in leaves:
        yield from _leaf(text, origins[start], origins[end - 1] + 1, spans)


def _leaf(text: str, start: int, end: int, spans: Spans) -> Iterator[str]:
    """A piece of text, in as many leaves as it has rejected parts and others."""
    if end - start != len(text):
        cuts = [start, end]
    else:
        cuts = sorted({start, end, *(offset for span in spans for offset in span if start < offset < end)})
    for low, high in pairwise(cuts):
        tag = "del" if any(begin < high and low < stop for begin, stop in spans) else "span"
        part = text[low - start : high - start] if len(cuts) > 2 else text
        yield f'<{tag} data-from="{low}" data-to="{high}">{html.escape(part)}</{tag}>'


def _tag(token: Token) -> str:
    if token.nesting < 0:
        return f"</{token.tag}>"
    attributes = {key: str(value) for key, value in token.attrs.items() if key in ("href", "start")}
    if alignment := ALIGNMENTS.get(str(token.attrs.get("style"))):
        attributes["class"] = alignment
    written = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    return f"<{token.tag}{written}>"
