"""The void boundary: a record's rejected responses as one prefix trie of token ids.

    record --tokenizer--> prompt ids + responses' ids --merge shared prefixes--> Boundary

A node is a point where the model chooses a next token: node 0 is the end of the prompt, node k the point
after the k-th token of the trie. At a node, v_i counts the rejections that pass through it and go on with
token i. Tokens outside the rejected spans add nothing to v, and neither does the end of a response: that
an answer stopped there was never what was wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from buleyean_rl.records import RejectionRecord


@dataclass(frozen=True)
class Boundary:
    """The prefix trie of one record, flat.

    The trie grows in *runs*: each response adds the part of it that no earlier response shares, as one
    unbranched piece that hangs from an existing node.

    Args:
        prompt: token ids of the prompt, up to where the answer begins.
        tokens: token ids of the nodes 1, 2, ..., run after run.
        runs: where each run starts in `tokens`.
        parents: the node each run hangs from.
        rejections: (node, token, v) of every rejected continuation, sorted by node.
        rounds: T of the record.
        truncated: how many responses lost tokens to the length limit.
    """

    prompt: list[int]
    tokens: list[int]
    runs: list[int]
    parents: list[int]
    rejections: list[tuple[int, int, int]]
    rounds: int
    truncated: int = 0

    @property
    def nodes(self) -> int:
        """How many nodes there are: one per token, and the end of the prompt."""
        return len(self.tokens) + 1

    @property
    def size(self) -> int:
        """How many tokens there are, the prompt's included."""
        return len(self.prompt) + len(self.tokens)

    def run_slices(self) -> list[slice]:
        """Each run's tokens, as a slice of `tokens`."""
        return [slice(a, b) for a, b in zip(self.runs, [*self.runs, len(self.tokens)][1:], strict=True)]

    def path(self, node: int) -> list[slice]:
        """The tokens from the prompt to `node`, as slices of `tokens` in order."""
        slices = self.run_slices()
        pieces = []
        while node > 0:
            run = max(r for r, piece in enumerate(slices) if piece.start < node)
            pieces.append(slice(slices[run].start, node))
            node = self.parents[run]
        return pieces[::-1]


def build_boundary(record: RejectionRecord, tokenizer: Any, max_length: int) -> Boundary | None:
    """Tokenise a record and merge its responses into a trie.

    Args:
        record: what was rejected.
        tokenizer: a transformers tokenizer.
        max_length: most tokens of prompt and response together; longer responses are cut at the end.

    Returns:
        The boundary, or None where the prompt leaves no room for a response or nothing rejected remains.
    """
    prompt = encode_prompt(tokenizer, record.prompt)
    room = max_length - len(prompt)
    if room < 1 or not prompt:
        return None
    responses, counts, truncated = [], [], 0
    for text, spans, count in zip(
        record.rejected_responses, record.rejected_spans, record.rejection_counts, strict=True
    ):
        ids, rejected = encode_response(tokenizer, text, spans)
        truncated += len(ids) > room
        responses.append((ids[:room], rejected[:room]))
        counts.append(count)
    boundary = merge_responses(prompt, responses, counts, record.total_rounds, truncated)
    return boundary if boundary.rejections else None


def merge_responses(
    prompt: list[int],
    responses: Sequence[tuple[list[int], list[bool]]],
    counts: Sequence[int],
    rounds: int,
    truncated: int = 0,
) -> Boundary:
    """The trie of some responses.

    Args:
        prompt: token ids.
        responses: token ids of each, and which of its tokens are rejected.
        counts: how often each was rejected.
        rounds: T.
        truncated: passed through.
    """
    children: list[dict[int, int]] = [{}]
    tokens: list[int] = []
    runs: list[int] = []
    parents: list[int] = []
    rejections: dict[tuple[int, int], int] = {}
    for (ids, rejected), count in zip(responses, counts, strict=True):
        node, growing = 0, False
        for token, is_rejected in zip(ids, rejected, strict=True):
            if is_rejected:
                rejections[node, token] = rejections.get((node, token), 0) + count
            if token not in children[node]:
                if not growing:
                    runs.append(len(tokens))
                    parents.append(node)
                    growing = True
                tokens.append(token)
                children[node][token] = len(tokens)
                children.append({})
            node = children[node][token]
    entries = sorted((node, token, v) for (node, token), v in rejections.items())
    return Boundary(prompt, tokens, runs, parents, entries, rounds, truncated)


def encode_prompt(tokenizer: Any, prompt: str | tuple[tuple[str, str], ...]) -> list[int]:
    """Token ids of a prompt, up to where the model's answer begins.

    Args:
        tokenizer: a transformers tokenizer; its chat template is used if it has one.
        prompt: the user's text, or (role, content) messages.
    """
    if tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt) + "\n\n"
        return list(tokenizer(text).input_ids)
    messages = (("user", prompt),) if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_response(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[bool]]:
    """Token ids of a response, and which of them are rejected.

    Args:
        tokenizer: a fast transformers tokenizer (one that knows character offsets).
        text: the response, without the end-of-turn token.
        spans: rejected [start, end) character ranges; none means all of it. A token that reaches into a
            span counts as rejected.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(spans))
    ids = list(encoded.input_ids)
    if not spans:
        return ids, [True] * len(ids)
    return ids, [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded.offset_mapping
    ]
