"""Loops, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.evaluation.repetition import is_looping, loop_rate, repeated_spans, repetition

# --- loops


@pytest.mark.parametrize(
    ("text", "grams", "repeats", "spans"),
    [
        ("", 0, 0, []),
        ("a b c d", 1, 0, []),
        ("a b c d a b c d", 5, 1, ["a b c d"]),  # abcd bcda cdab dabc abcd
        ("a a a a a a", 3, 2, ["a a a a a"]),  # the second and third gram begin at the second a
        ("No. No. No. No.", 5, 3, ["No. No. No."]),  # a full stop is a unit too
        ("No! NO! no! nO!", 5, 3, ["NO! no! nO!"]),  # case does not count
        ("再见再见再见", 3, 1, ["再见再见"]),  # unspaced scripts: a character is a unit
        ("🙂🙂🙂🙂🙂", 2, 1, ["🙂🙂🙂🙂"]),
        ("über Öl ÜBER öl über Öl", 3, 1, ["ÜBER öl über Öl"]),
    ],
)
def test_repeats_by_hand(text: str, grams: int, repeats: int, spans: list[str]) -> None:
    assert repetition(text) == (repeats / grams if grams else 0)
    assert [text[start:end] for start, end in repeated_spans(text)] == spans


words = st.lists(st.sampled_from(["a", "b", "é", "漢", "🙂", ".", "\n"]), max_size=30).map(" ".join)


@given(words)
def test_spans_lie_in_the_text_in_order_and_apart(text: str) -> None:
    spans = repeated_spans(text)
    assert bool(spans) == (repetition(text) > 0)
    flat = [edge for span in spans for edge in span]
    assert flat == sorted(set(flat))
    assert all(0 <= edge <= len(text) for edge in flat)
    assert all(text[start:end] == text[start:end].strip() for start, end in spans)
    assert 0 <= repetition(text) < 1


def test_an_answer_loops_above_three_tenths() -> None:
    ten_grams = "a b c d e f a b c d e f g"  # 10 grams, 3 of them repeats: exactly 0.3
    assert repetition(ten_grams) == 0.3
    assert not is_looping(ten_grams)
    assert is_looping("a b c d e f g a b c d e f g")  # 4 of 11
    assert loop_rate(["fine", "no no no no no no", ten_grams, "la la la la la la"]) == 0.5
