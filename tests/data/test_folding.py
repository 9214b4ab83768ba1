"""Folding: counts of equal answers add up, whatever the order, in memory and through a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.records import (
    RejectionRecord,
    Spans,
    accumulate_records,
    fold_records,
    folding,
    make_record,
    read_records,
)
from buleyean_rl.data.records.folding import merge_records, write_folded
from buleyean_rl.errors import RecordError
from drawn import drawn_records

Contents = dict[object, tuple[int, dict[tuple[str, Spans], int]]]


def contents(records: list[RejectionRecord]) -> Contents:
    """What records say, whatever their order."""
    return {
        record.prompt: (record.total_rounds, {(text, spans): count for text, count, spans in record.entries()})
        for record in records
    }


def test_two_records_of_one_round_make_two_rounds() -> None:
    same = merge_records([make_record("p", ["a"]), make_record("p", ["a"])])
    assert same == RejectionRecord("p", ("a",), (2,), 2, ((),))
    other = merge_records([make_record("p", ["a"]), make_record("p", ["b"])])
    assert other == RejectionRecord("p", ("a", "b"), (1, 1), 2, ((), ()))


@given(st.lists(drawn_records(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_folding_ignores_order_keeps_totals_and_is_the_same_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, records: list[RejectionRecord], random: object
) -> None:
    folded = fold_records(records)
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert contents(fold_records(shuffled)) == contents(folded)
    assert fold_records(folded) == folded
    assert sum(sum(r.rejection_counts) for r in folded) == sum(sum(r.rejection_counts) for r in records)
    assert sum(r.total_rounds for r in folded) == sum(r.total_rounds for r in records)
    assert all(max(r.rejection_counts) <= r.total_rounds for r in folded)
    assert len({r.prompt for r in folded}) == len(folded)

    path = tmp_path_factory.mktemp("fold") / "r.jsonl"
    report = write_folded(path, iter(records))
    assert list(read_records(path)) == folded
    assert report.records == len(folded)
    assert report.rejections == sum(sum(r.rejection_counts) for r in folded)
    assert report.answers == sum(len(r.rejected_responses) for r in folded)
    assert report.answers_folded == sum(len(r.rejected_responses) for r in records) - report.answers
    assert report.prompts_repeated == len(records) - len(folded)
    assert report.empty == sum(r.rejected_responses.count("") for r in folded)


def test_two_prompts_of_one_hash_stay_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "hash", lambda _: 7, raising=False)
    records = [make_record(prompt, ["a"]) for prompt in ("p", "q", "p")]
    report = write_folded(tmp_path / "r.jsonl", records)
    assert list(read_records(tmp_path / "r.jsonl")) == fold_records(records)
    assert (report.records, report.prompts_repeated) == (2, 1)


def test_the_limit_counts_records_and_none_at_all_write_nothing(tmp_path: Path) -> None:
    records = [make_record(prompt, ["a"]) for prompt in ("p", "p", "q", "r")]
    assert write_folded(tmp_path / "r.jsonl", records, limit=2).records == 2
    assert [r.prompt for r in read_records(tmp_path / "r.jsonl")] == ["p", "q"]
    with pytest.raises(RecordError, match="nothing was written"):
        write_folded(tmp_path / "none.jsonl", [])
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_accumulated_answers_keep_their_rates() -> None:
    first = [make_record("p", ["a", "b"], [60, 20], 60), make_record("q", ["c"], [60], 60)]
    second = [make_record("p", ["a", "d"], [60, 30], 60, [[], [[0, 1]]])]
    assert accumulate_records([*first, *second]) == [
        make_record("p", ["a", "b", "d"], [120, 40, 60], 120, [[], [], [[0, 1]]]),
        make_record("q", ["c"], [60], 60),
    ]
    never_rejected = make_record("Hi", ["No.", "Hello!"], [3, 0])
    (accumulated,) = accumulate_records([never_rejected, never_rejected])
    assert (accumulated.rejection_counts, accumulated.total_rounds) == ((6, 0), 6)
