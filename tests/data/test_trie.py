"""The prefix trie against separate sequences; spans in characters; what is cut and what is dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.trie import Boundary, _rejected_end, build_boundaries, build_boundary, merge_responses
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT_TOKENS = Encoder(TOKENIZER).encode_prompts(["Hi"])[0].length

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
        (max((1, *counts)),) * len(responses),
        spans or ((),) * len(responses),  # type: ignore[arg-type]
    )


def prefix(boundary: Boundary, node: int) -> tuple[int, ...]:
    return tuple(token for piece in boundary.path(node) for token in boundary.tokens[piece])


# --- the trie


def test_trie_by_hand() -> None:
    """ "a b c" four times, "a b d" twice, "e" once: one shared stem, two branches from it, one from the prompt."""
    a, b, c, d, e = 10, 11, 12, 13, 14
    whole = [True] * 3
    got = merge_responses([1, 2], [([a, b, c], whole), ([a, b, d], whole), ([e], [True])], [4, 2, 1], [9] * 3)
    assert got.tokens == [a, b, c, d, e]
    assert (got.runs, got.parents) == ([0, 3, 4], [0, 2, 0])
    assert got.judgements == [
        (0, a, 6, 18, 9),
        (0, e, 1, 9, 9),
        (1, b, 6, 18, 9),
        (2, c, 4, 9, 9),
        (2, d, 2, 9, 9),
    ]
    assert (got.rejected_answers, got.accepted_answers) == (3, 0)
    assert got.nodes == 6
    assert [prefix(got, node) for node in range(6)] == [(), (a,), (a, b), (a, b, c), (a, b, d), (e,)]


def test_rounds_add_up_where_answers_go_on_with_the_same_token() -> None:
    """ "a b" rejected once of once, "a c" accepted nine times, "d" rejected twice of five."""
    a, b, c, d = 10, 11, 12, 13
    whole = [True] * 2
    got = merge_responses([1], [([a, b], whole), ([a, c], whole), ([d], [True])], [1, 0, 2], [1, 9, 5])
    assert got.judgements == [(0, a, 1, 10, 9), (0, d, 2, 5, 5), (1, b, 1, 1, 1), (1, c, 0, 9, 9)]
    assert (got.rejected_answers, got.accepted_answers) == (2, 1)
    assert (got.counts, got.rounds) == ([1, 0, 2], [1, 9, 5])


def test_a_token_outside_the_span_of_an_answer_has_none_of_its_rounds() -> None:
    got = merge_responses([1], [([5, 6], [False, True]), ([5, 6], [True, True])], [2, 1], [3, 4])
    assert got.judgements == [(0, 5, 1, 4, 4), (1, 6, 3, 7, 4)]


def test_the_rejected_terms_of_an_average_rejected_answer() -> None:
    whole = [True] * 4
    answers = [([5, 6, 7, 8], whole), ([5, 9], [False, True]), ([4], [True]), ([], [])]
    boundary = merge_responses([1], answers, [1, 1, 0, 1], [1, 1, 9, 1])
    assert boundary.rejected_terms_per_answer() == (4 + 2) / 2  # neither the accepted answer nor the empty one


def test_node_weights_by_hand() -> None:
    """ "a b" rejected, "a c d" accepted, "e" accepted: of "a c d" the first two nodes are in the weight of "a b"."""
    a, b, c, d, e = range(10, 15)
    boundary = merge_responses(
        [1], [([a, b], [True] * 2), ([a, c, d], [True] * 3), ([e], [True])], [1, 0, 0], [1, 1, 1]
    )
    assert boundary.tokens == [a, b, c, d, e]
    expected = [1 / 3, 1 / 3, 1 / 3, 2 / 4, 2 / 4, 2 / 2]
    assert boundary.node_weights(2.0) == pytest.approx(expected)


@given(st.lists(st.tuples(flagged, st.integers(0, 2)), min_size=1, max_size=6))
def test_node_weights_are_means_over_answers(drawn: list[tuple[tuple[list[int], list[bool]], int]]) -> None:
    responses, counts = [response for response, _ in drawn], [count for _, count in drawn]
    boundary = merge_responses([7], responses, counts, [2] * len(counts))
    losses = [1.0 + node * node for node in range(boundary.nodes)]
    at = {prefix(boundary, node): loss for node, loss in enumerate(losses)}
    texts = {tuple(ids): 0 for ids, _ in responses if ids}
    for (ids, _), count in drawn:
        if ids:
            texts[tuple(ids)] += count
    passed = {text[:n] for text, count in texts.items() if count for n in range(len(text) + 1)}
    plain = 0.0
    for text, count in texts.items():
        nodes = [text[:n] for n in range(len(text) + 1)]
        own = nodes if count else [node for node in nodes if node not in passed]
        plain += (1.0 if count else 0.5) * sum(at[node] for node in own) / len(nodes)
    weights = boundary.node_weights(0.5)
    assert sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) == pytest.approx(plain)


@given(counted_responses)
def test_trie_is_the_separate_sequences_with_counts_merged(
    drawn: list[tuple[tuple[list[int], list[bool]], int]],
) -> None:
    responses, counts = [response for response, _ in drawn], [count for _, count in drawn]
    boundary = merge_responses([7], responses, counts, [99] * len(counts))

    prefixes = {tuple(ids[:n]) for ids, _ in responses for n in range(len(ids) + 1)}
    paths = [prefix(boundary, node) for node in range(boundary.nodes)]
    assert len(paths) == len(prefixes)  # no prefix twice ...
    assert set(paths) == prefixes  # ... and none missing

    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    for (ids, rejected), count in zip(responses, counts, strict=True):
        for n, token in enumerate(ids):
            if rejected[n]:
                expected[tuple(ids[:n]), token] += count
    assert {(paths[node], token): v for node, token, v, *_ in boundary.judgements} == expected
    assert boundary.judgements == sorted(boundary.judgements)

    runs = boundary.run_slices()  # they tile the tokens and hang from earlier nodes
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(boundary.tokens)))
    assert all(parent <= run.start for run, parent in zip(runs, boundary.parents, strict=True))


# --- spans


def test_outside_its_spans_a_response_has_nodes_but_no_rejections() -> None:
    text = "The capital of France is Lyon."
    start = text.index("Lyon")
    boundary = build_boundary(record(text, spans=(((start, start + 4),),)), TOKENIZER, 512)
    assert boundary is not None
    assert boundary.nodes == len(TOKENIZER(text).input_ids) + 1
    assert TOKENIZER.decode([token for _, token, *_ in boundary.judgements]).strip() == "Lyon"


# --- what is cut, and what is dropped


def test_long_responses_are_cut_at_the_end_and_counted() -> None:
    room = PROMPT_TOKENS + 3
    boundary = build_boundary(record("Ignore it, or talk", "No"), TOKENIZER, room)
    assert boundary is not None
    assert boundary.truncated == 1
    longest = max((prefix(boundary, node) for node in range(boundary.nodes)), key=len)
    assert list(longest) == TOKENIZER("Ignore it, or talk").input_ids[:3]


def test_an_answer_rejected_in_parts_ends_where_so_many_tokens_of_it_were() -> None:
    ids, rejected = [1, 2, 3, 4, 5, 6], [False, True, False, True, True, False]
    ends = {most: _rejected_end(rejected, most) for most in (1, 2, 3, 4, None)}
    assert ends == {1: 2, 2: 4, 3: 5, 4: len(ids), None: len(ids)}
    assert _rejected_end([True] * 3, 1) == 3  # a whole answer
    text = "Go to bed early. Go to bed early."
    looping, whole = record(text, "No", spans=(((16, 33),), ())), record(text, counts=(0,))
    one, none = build_boundaries([looping, whole], Encoder(TOKENIZER, 512), max_rejected=1)
    assert one is not None
    assert none is not None
    assert len(one.judgements) == 1 + len(TOKENIZER("No").input_ids)
    assert none.accepted_ends == {len(TOKENIZER(text).input_ids)}


def test_what_has_no_rejected_token_is_dropped() -> None:
    length = PROMPT_TOKENS
    assert build_boundary(record("No"), TOKENIZER, length + 1) is not None
    for room in (length, length - 1):
        assert build_boundary(record("No"), TOKENIZER, room) is None
    assert build_boundary(record(""), TOKENIZER, 512) is None
    text = "Ignore it, or talk"  # its span lies beyond the cut
    assert build_boundary(record(text, spans=(((len(text) - 4, len(text)),),)), TOKENIZER, length + 1) is None


def test_an_empty_response_among_others_changes_nothing() -> None:
    alone = RejectionRecord("Hi", ("No",), (2,), (5,), ((),))
    both = build_boundary(record("", "No", counts=(5, 2)), TOKENIZER, 512)
    expected = build_boundary(alone, TOKENIZER, 512)
    assert both is not None
    assert (both.ends, both.counts) == ([0, len(both.tokens)], [5, 2])
    assert replace(both, ends=[], counts=[], rounds=[]) == replace(expected, ends=[], counts=[], rounds=[])


def test_an_answer_never_rejected_has_nodes_with_judgements_but_no_rejections() -> None:
    built = build_boundary(record("No", "Yes!", counts=(2, 0)), TOKENIZER, 512)
    assert built is not None
    assert built.counts == [2, 0]
    assert len(built.tokens) == built.ends[1] > built.ends[0]
    rejected, accepted = ({node for node, _, v, *_ in built.judgements if bool(v) == some} for some in (True, False))
    assert rejected == set(range(built.ends[0]))
    assert accepted == {0, *range(built.ends[0] + 1, built.ends[1])}  # from where the two part ways
    assert (built.rejected_answers, built.accepted_answers) == (1, 1)


def test_a_record_without_a_rejection_is_kept_to_anchor() -> None:
    built = build_boundary(record("Yes!", counts=(0,)), TOKENIZER, 512)
    assert built is not None
    assert (built.rejected_answers, built.accepted_answers) == (0, 1)
    assert [(node, v, n) for node, _, v, n, _ in built.judgements] == [(node, 0, 1) for node in range(built.nodes - 1)]
    assert build_boundary(record("", counts=(0,)), TOKENIZER, 512) is None
    assert build_boundary(record("", "Yes!", counts=(1, 0)), TOKENIZER, 512) is None  # its rejection is lost


def test_the_same_text_with_other_spans_shares_its_nodes() -> None:
    text = "Ignore it"
    boundary = build_boundary(record(text, text, counts=(2, 3), spans=(((0, 6),), ((7, 9),))), TOKENIZER, 512)
    assert boundary is not None
    assert boundary.nodes == len(TOKENIZER(text).input_ids) + 1
    assert {v for _, _, v, *_ in boundary.judgements} == {2, 3}
