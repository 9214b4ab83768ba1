"""The demo's prompts and texts: enough of them, clean, and no near-duplicate within or across the splits.

Two prompts are near-duplicates when, lower-cased, they share
  - half of their content words (Jaccard; words without stop words and request words, plural "s" cut off), or
  - 0.3 of their word 3-shingles (Jaccard, with stop words; a prompt under three words is one shingle).
The first catches rewordings ("Explain gravity" / "What is gravity?"), the second
a template with one word changed.
"""

import re
import statistics
from itertools import combinations
from pathlib import Path

import pytest

from buleyean_rl import demo_data
from buleyean_rl.demo_data import held_out_prompts, mine_prompts, neutral_texts

CONTENT_LIMIT = 0.5
SHINGLE_LIMIT = 0.3

STOP_TEXT = """
a about all also am an and another any are as at be been but by can could did do does don't each for
from get give had has have he her him his how i i'd i'm i've if in into is it it's its like make may
me more most much my no not of on or our out please she should so some than that the their them then
there they this to up us was we were what what's when where which who whom whose why will with would
you your write tell list name explain describe create suggest show help need want
"""
STOP_WORDS = frozenset(STOP_TEXT.split())


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower().replace("’", "'"))


def content(text: str) -> set[str]:
    content_words = [word for word in words(text) if word not in STOP_WORDS] or words(text)
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in content_words}


def shingles(text: str) -> set[tuple[str, ...]]:
    all_words = words(text)
    return {tuple(all_words[i : i + 3]) for i in range(max(1, len(all_words) - 2))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: list[str]) -> list[tuple[str, str]]:
    seen = [(text, content(text), shingles(text)) for text in texts]
    return [
        (a, b)
        for (a, content_a, shingles_a), (b, content_b, shingles_b) in combinations(seen, 2)
        if jaccard(content_a, content_b) >= CONTENT_LIMIT or jaccard(shingles_a, shingles_b) >= SHINGLE_LIMIT
    ]


def test_there_are_enough_of_each() -> None:
    assert len(mine_prompts()) >= 300
    assert len(held_out_prompts()) >= 100
    assert len(neutral_texts()) == 24


@pytest.mark.parametrize("name", ["mine_prompts.txt", "held_out_prompts.txt", "neutral.txt"])
def test_files_have_no_blank_duplicate_or_untidy_lines(name: str) -> None:
    raw = (Path(demo_data.__file__).parent / name).read_bytes().decode("utf-8")
    assert raw.endswith("\n")
    lines = raw.removesuffix("\n").split("\n")
    assert all(lines)
    assert all(line == " ".join(line.split()) for line in lines)
    assert all(line.isprintable() for line in lines)
    assert len(lines) == len({line.casefold() for line in lines})


def test_no_near_duplicates_within_or_across_the_splits() -> None:
    assert near_duplicates(mine_prompts() + held_out_prompts()) == []


def test_no_near_duplicates_among_the_neutral_texts() -> None:
    assert near_duplicates(neutral_texts()) == []


@pytest.mark.parametrize(
    ("original", "planted"),
    [
        ("What is gravity?", "Explain gravity."),
        ("How do I descale a kettle?", "how can i descale my kettle"),
        ("Give me a recipe for banana bread.", "Please give me a banana bread recipe!"),
        ("Suggest ten names for a coffee shop.", "Suggest ten names for a flower shop."),
        ("Write a short poem about the first snow.", "Write a short poem about the first rain."),
    ],
)
def test_the_rule_catches_a_planted_near_duplicate(original: str, planted: str) -> None:
    assert near_duplicates([original, "Why do cats purr?", planted]) == [(original, planted)]


def test_the_rule_catches_a_reworded_copy_of_every_bundled_prompt() -> None:
    for prompt in mine_prompts() + held_out_prompts():
        assert near_duplicates([prompt, f"Please, could you help me: {prompt.lower().rstrip('.?!')}"])


def test_the_rule_lets_different_prompts_pass() -> None:
    different = [
        "Give me ten ideas for a rainy Sunday.",
        "Give me a recipe for banana bread.",
        "What is inflation?",
    ]
    assert near_duplicates(different) == []


def test_both_splits_mix_lengths_alike() -> None:
    mine, held_out = ([len(prompt.split()) for prompt in split] for split in (mine_prompts(), held_out_prompts()))
    for lengths in (mine, held_out):
        assert 3 <= min(lengths) <= 5
        assert 40 <= max(lengths) <= 60
        assert 0.05 < statistics.mean(n <= 6 for n in lengths) < 0.25
        assert 0.02 < statistics.mean(n > 25 for n in lengths) < 0.12
    assert statistics.mean(mine) == pytest.approx(statistics.mean(held_out), rel=0.15)


def test_neutral_texts_are_short_prose_and_no_instructions() -> None:
    requests = STOP_WORDS & {
        "write",
        "tell",
        "list",
        "name",
        "explain",
        "describe",
        "create",
        "suggest",
        "show",
        "give",
    }
    for text in neutral_texts():
        assert 40 <= len(words(text)) <= 80
        assert text.endswith(".")
        assert "?" not in text
        assert not {"you", "your", "i", "please"} & set(words(text))
        assert all(words(sentence)[0] not in requests for sentence in text.split(". "))
