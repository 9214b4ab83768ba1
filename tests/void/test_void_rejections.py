"""The store's rejections and imports."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from buleyean_rl.data.records import make_record
from buleyean_rl.errors import RecordError
from buleyean_rl.void.store import Store
from buleyean_rl.void.store.rejections import MAX_SHOWN, RejectedAnswer
from void_rows import add_import, given, reject


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "void.db")
    yield opened
    opened.close()


def test_a_rejection_is_said_why_undone_and_redone(store: Store) -> None:
    whole = reject(store, "uid-1")
    part = reject(store, "uid-3", spans=((0, 1),), reason="why")
    other = reject(store, "uid-4", "b")
    rows = store.rejections.page()["rows"]
    assert [(row["answer"], row["spans"], row["reason"]) for row in rows] == [
        ("b", [], ""), ("a", [[0, 1]], "why"), ("a", [], ""),
    ]  # fmt: skip
    assert store.rejections.records() == [
        make_record("p", ["a", "a", "b"], [1, 1, 1], None, [[], [[0, 1]], []], rounds=[1, 1, 1])
    ]
    assert store.rejections.set_reason([whole, other, 99], "because") == 2
    assert store.rejections.undo([whole, part]) == 2
    assert [(row["id"], row["reason"]) for row in store.rejections.page()["rows"]] == [(other, "because")]
    assert store.rejections.undo([part], undone=False) == 1
    assert store.rejections.count() == 2
    assert not store.rejections.undo([99])


def test_the_same_thing_is_rejected_once(store: Store) -> None:
    first = reject(store, "uid-1")
    assert reject(store, "uid-1") == reject(store, "uid-2") == first
    store.rejections.undo([first])
    again = reject(store, "uid-3")
    assert again != first
    assert reject(store, "uid-1") == first  # sent again, late: it is undone and stays so
    assert store.rejections.count() == 1


def test_rejections_are_searched(store: Store) -> None:
    for number, (answer, reason) in enumerate([("a cat", ""), ("100% dog", "boring"), ("100x dog", "")]):
        reject(store, f"uid-{number}", answer, reason=reason)

    def found(words: str) -> list[str]:
        page = store.rejections.page(words=words)
        assert page["total"] == len(page["rows"])
        return [row["answer"] for row in page["rows"]]

    assert found("DOG") == ["100x dog", "100% dog"]
    assert found("100%") == found("boring") == ["100% dog"]
    assert found("p") == ["100x dog", "100% dog", "a cat"]
    assert found("_") == []


def test_the_newest_rejections_in_few_words(store: Store) -> None:
    reject(store, "uid-1", "word " * 100)
    reject(store, "uid-2", "good bad\n bad good", spans=((5, 13),), reason="why")
    newest = store.rejections.newest(3)
    assert [row["text"] for row in newest] == ["bad bad", ("word " * 100)[:119] + "…"]
    assert newest[0]["reason"] == "why"


def test_what_is_asked_again_are_the_newest_prompts(store: Store) -> None:
    for number in range(5):
        reject(store, f"uid-{number}", f"answer {number}")
        store.rejections.add(f"own-{number}", given("x", f"prompt {number}"), spans=((0, 1),))
    examples = store.rejections.examples(3)
    assert [(prompt, answers[0].text) for prompt, answers in examples] == [
        ('"prompt 4"', "x"), ('"p"', "answer 4"), ('"prompt 3"', "x"),
    ]  # fmt: skip
    assert examples[0][1] == [RejectedAnswer("x", ((0, 1),), False)]
    assert len(examples[1][1]) == 5


def test_what_is_asked_again_has_all_that_was_rejected_of_it(store: Store) -> None:
    drawn = {"policy": {"temperature": 0.0}}
    for number, span in enumerate(((4, 5), (0, 1))):
        store.rejections.add(f"uid-{number}", given("a b c", drawn=drawn), spans=(span,))
    whole = store.rejections.add("uid-2", given("x", drawn={"policy": {"temperature": 1.0}}))["id"]
    store.rejections.add("uid-3", given("x"), spans=((0, 1),))
    ((_, answers),) = store.rejections.examples(3)
    assert answers == [RejectedAnswer("x", (), False), RejectedAnswer("a b c", ((0, 1), (4, 5)), True)]
    store.rejections.undo([whole])
    assert store.rejections.examples(3)[0][1][0].spans == ((0, 1),)


@pytest.mark.parametrize("spans", [((0, 9),), ((1, 1),), ((True, 1),), ("ab",), (None,)])
def test_spans_beyond_the_answer_are_refused(store: Store, spans: tuple[object, ...]) -> None:
    with pytest.raises(RecordError):
        reject(store, "uid-1", spans=spans)
    assert store.rejections.count() == 0


def test_records_come_in_once_and_go_out_as_they_came(store: Store) -> None:
    records = [
        make_record("q", ["x", "y"], [45, 12], 60, [[[0, 1]], []]),
        make_record([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], ["é"], [1], 1),
    ]
    assert add_import(store, "upload-1", records) == 3
    assert add_import(store, "upload-1", records) == 0
    assert store.rejections.records() == records
    assert store.rejections.page()["rows"][0]["prompt"] == "system: s\nuser: u"


def test_a_persons_no_stands_beside_imported_counts(store: Store) -> None:
    add_import(store, "upload-1", [make_record("p", ["x"], [1], 3)])
    reject(store, "uid-1", "a")
    assert store.rejections.records() == [make_record("p", ["x", "a"], [1, 1], rounds=[3, 1])]


def test_what_drew_an_answer_comes_out_as_it_came(store: Store) -> None:
    record = make_record(
        "p",
        ["x", "y"],
        [1, 1],
        rounds=[1, 2],
        token_ids=[[5, 6], None],
        ended=[True, None],
        tokenizer="abc",
        policy={"model": "m"},
    )
    add_import(store, "upload-1", [record])
    assert store.rejections.records() == [record]


def test_an_answer_that_was_never_rejected_stays_beside_those_that_were(store: Store) -> None:
    record = make_record("p", ["x", "y"], [3, 0], 3)
    assert add_import(store, "upload-1", [record]) == 1
    assert [row["answer"] for row in store.rejections.page()["rows"]] == ["x"]
    assert store.rejections.records() == [record]
    store.rejections.undo([1])
    assert store.rejections.records() == [make_record("p", ["y"], [0], 3)]  # which anchors
    assert store.rejections.count() == 0


def test_a_reason_outlives_an_undo(store: Store) -> None:
    store.rejections.undo([reject(store, "uid-1", reason="why")])
    assert store.rejections.add("uid-2", given())["reason"] == "why"
    part = store.rejections.add("uid-3", given(), ((0, 1),))
    assert part["reason"] == ""  # another rejection than the one that was undone


def test_a_book_is_shown_in_part_and_exported_whole(store: Store) -> None:
    record = make_record("p" * 50_000, ["a" * 50_000])
    add_import(store, "upload-1", [record])
    (row,) = store.rejections.page()["rows"]
    assert (len(row["prompt"]), len(row["answer"])) == (MAX_SHOWN + 1, MAX_SHOWN)
    assert store.rejections.records() == [record]


def test_a_record_has_the_tokens_that_were_drawn(store: Store) -> None:
    drawn = {"token_ids": [5, 6], "ended": False, "tokenizer": "t", "policy": {"model": "m", "temperature": 0.0}}
    store.rejections.add("n-1", given("ab", drawn=drawn))
    (record,) = store.rejections.records()
    assert (record.token_ids, record.ended, record.tokenizer) == (((5, 6),), (False,), "t")
    assert record.policy == drawn["policy"]
    store.rejections.add("n-2", given("  ", "q", drawn=drawn))  # nothing was said
    assert [judged.text for judged in store.rejections.records()[1].entries()] == [""]


def test_a_page_of_ten_thousand_rejections(store: Store) -> None:
    texts = random.Random(0)
    records = [
        make_record(f"prompt {number}", [f"answer {number} " + "words " * texts.randrange(50, 200)])
        for number in range(10_000)
    ]
    add_import(store, "upload-1", records)
    reject(store, "uid-1")
    assert store.rejections.page(0)["total"] == 10_001
    assert len(store.rejections.page(199)["rows"]) == 50
