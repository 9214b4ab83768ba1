"""The prefix trie against separate sequences; spans in characters; what is cut and what is dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.encode import encode_prompt, encode_response
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.trie import Boundary, build_boundary, merge_responses
from tiny import SENTENCES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BARE = tiny_tokenizer()
BARE.chat_template = None

tokens = st.lists(st.integers(0, 3), max_size=6)  # few kinds of token, so that prefixes are shared
flagged = tokens.flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
)
counted_responses = st.lists(st.tuples(flagged, st.integers(1, 9)), min_size=1, max_size=5)


def record(*responses: str, counts: tuple[int, ...] = (), spans: object = (), prompt: object = "Hi") -> RejectionRecord:
    return RejectionRecord(
        prompt,  # type: ignore[arg-type]
        responses,
        counts or (1,) * len(responses),
        (max(counts, default=1),) * len(responses),
        spans or ((),) * len(responses),  # type: ignore[arg-type]
    )


def prefix(boundary: Boundary, node: int) -> tuple[int, ...]:
    return tuple(token for piece in boundary.path(node) for token in boundary.tokens[piece])


# --- the trie


def test_trie_by_hand() -> None:
    """ "a b c" four times, "a b d" twice, "e" once: one shared stem, two branches from it, one from the prompt."""
    a, b, c, d, e = 10, 11, 12, 13, 14
    whole = [True] * 3
    got = merge_responses([1, 2], [([a, b, c], whole), ([a, b, d], whole), ([e], [True])], [4, 2, 1], 9)
    assert got.tokens == [a, b, c, d, e]
    assert (got.runs, got.parents) == ([0, 3, 4], [0, 2, 0])
    assert got.rejections == [(0, a, 6), (0, e, 1), (1, b, 6), (2, c, 4), (2, d, 2)]
    assert got.nodes == 6
    assert [prefix(got, node) for node in range(6)] == [(), (a,), (a, b), (a, b, c), (a, b, d), (e,)]


@given(counted_responses)
def test_trie_is_the_separate_sequences_with_counts_merged(
    drawn: list[tuple[tuple[list[int], list[bool]], int]],
) -> None:
    responses, counts = [response for response, _ in drawn], [count for _, count in drawn]
    boundary = merge_responses([7], responses, counts, 99)

    prefixes = {tuple(ids[:n]) for ids, _ in responses for n in range(len(ids) + 1)}
    paths = [prefix(boundary, node) for node in range(boundary.nodes)]
    assert len(paths) == len(prefixes)  # no prefix twice ...
    assert set(paths) == prefixes  # ... and none missing

    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    for (ids, rejected), count in zip(responses, counts, strict=True):
        for n, token in enumerate(ids):
            if rejected[n]:
                expected[tuple(ids[:n]), token] += count
    assert {(paths[node], token): v for node, token, v in boundary.rejections} == expected
    assert boundary.rejections == sorted(boundary.rejections)

    runs = boundary.run_slices()  # they tile the tokens and hang from earlier nodes
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(boundary.tokens)))
    assert all(parent <= run.start for run, parent in zip(runs, boundary.parents, strict=True))


# --- spans


def rejected_text(text: str, *spans: tuple[int, int]) -> str:
    ids, rejected = encode_response(TOKENIZER, text, spans)
    return TOKENIZER.decode([token for token, is_rejected in zip(ids, rejected, strict=True) if is_rejected])


def test_spans_are_characters_not_bytes() -> None:
    for text, part in (
        ("🙂🙂 yes", "🙂🙂"),  # four bytes and one character each: bytes would end in the middle
        ("cafe\u0301 or cafe\u0301?", "?"),  # e and its accent are two characters
        ("👩‍👧 1", "1"),
    ):
        start = text.rindex(part)
        assert rejected_text(text, (start, start + len(part))).strip() == part.strip()


def byte_ranges(text: str) -> list[tuple[int, int]]:
    """Where each token stands in the text's bytes; byte-level BPE writes a byte as a character."""
    ends = [0]
    for token in TOKENIZER.convert_ids_to_tokens(TOKENIZER(text, add_special_tokens=False).input_ids):
        ends.append(ends[-1] + len(token))
    return list(pairwise(ends))


@given(
    st.lists(st.sampled_from([*"ab 1é🙂漢\n", "e\u0301", " the", "Ignore"]), min_size=1, max_size=12).map("".join),
    st.data(),
)
def test_a_token_counts_exactly_if_it_reaches_into_a_span(text: str, data: st.DataObject) -> None:
    place = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).filter(lambda pair: pair[0] < pair[1])
    spans = data.draw(st.lists(place, min_size=1, max_size=2))
    in_bytes = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    _, rejected = encode_response(TOKENIZER, text, spans)
    assert rejected == [any(a < end and b > start for start, end in in_bytes) for a, b in byte_ranges(text)]


def test_a_token_that_straddles_an_edge_counts() -> None:
    ids, rejected = encode_response(TOKENIZER, "Paris", [(4, 5)])
    pieces = [TOKENIZER.decode([token]) for token in ids]
    assert len(pieces[-1]) > 1  # the last token begins before the span does
    assert rejected == [False] * (len(ids) - 1) + [True]


def test_no_spans_reject_every_token() -> None:
    text = " ".join(SENTENCES)
    ids, rejected = encode_response(TOKENIZER, text)
    assert ids == TOKENIZER(text, add_special_tokens=False).input_ids
    assert rejected == [True] * len(ids)
    assert encode_response(TOKENIZER, text, [(0, len(text))]) == (ids, rejected)


def test_outside_its_spans_a_response_has_nodes_but_no_rejections() -> None:
    text = "The capital of France is Lyon."
    start = text.index("Lyon")
    boundary = build_boundary(record(text, spans=(((start, start + 4),),)), TOKENIZER, 512)
    assert boundary is not None
    assert boundary.nodes == len(TOKENIZER(text).input_ids) + 1
    assert TOKENIZER.decode([token for _, token, _ in boundary.rejections]).strip() == "Lyon"


# --- prompts


def test_the_chat_template_wraps_the_prompt() -> None:
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, "Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    conversation = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in conversation)
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, conversation)) == text + "<|im_start|>assistant\n"


def test_without_a_template_the_prompt_is_its_text() -> None:
    assert encode_prompt(BARE, "Hi there") == BARE("Hi there").input_ids
    assert encode_prompt(BARE, (("system", "Be brief."), ("user", "Hi"))) == BARE("Be brief.\n\nHi\n\n").input_ids


# --- what is cut, and what is dropped


def test_long_responses_are_cut_at_the_end_and_counted() -> None:
    room = len(encode_prompt(TOKENIZER, "Hi")) + 3
    boundary = build_boundary(record("Ignore it, or talk", "No"), TOKENIZER, room)
    assert boundary is not None
    assert boundary.truncated == 1
    longest = max((prefix(boundary, node) for node in range(boundary.nodes)), key=len)
    assert list(longest) == TOKENIZER("Ignore it, or talk").input_ids[:3]


def test_what_has_no_rejected_token_is_dropped() -> None:
    length = len(encode_prompt(TOKENIZER, "Hi"))
    assert build_boundary(record("No"), TOKENIZER, length + 1) is not None
    for room in (length, length - 1):
        assert build_boundary(record("No"), TOKENIZER, room) is None
    assert build_boundary(record(""), TOKENIZER, 512) is None
    text = "Ignore it, or talk"  # its span lies beyond the cut
    assert build_boundary(record(text, spans=(((len(text) - 4, len(text)),),)), TOKENIZER, length + 1) is None


def test_an_empty_response_among_others_changes_nothing() -> None:
    alone = RejectionRecord("Hi", ("No",), (2,), 5, ((),))
    both = build_boundary(record("", "No", counts=(5, 2)), TOKENIZER, 512)
    expected = build_boundary(alone, TOKENIZER, 512)
    assert both is not None
    assert (both.ends, both.counts) == ([0, len(both.tokens)], [5, 2])
    assert replace(both, ends=[], counts=[]) == replace(expected, ends=[], counts=[])


def test_an_answer_never_rejected_has_nodes_but_no_rejections() -> None:
    built = build_boundary(record("No", "Yes!", counts=(2, 0)), TOKENIZER, 512)
    assert built is not None
    assert built.counts == [2, 0]
    assert len(built.tokens) == built.ends[1] > built.ends[0]
    assert {node for node, _, _ in built.rejections} == set(range(built.ends[0]))


def test_the_same_text_with_other_spans_shares_its_nodes() -> None:
    text = "Ignore it"
    boundary = build_boundary(record(text, text, counts=(2, 3), spans=(((0, 6),), ((7, 9),))), TOKENIZER, 512)
    assert boundary is not None
    assert boundary.nodes == len(TOKENIZER(text).input_ids) + 1
    assert {v for _, _, v in boundary.rejections} == {2, 3}
