"""Folding: counts of equal answers add up, whatever the order, in memory and through a file."""

from __future__ import annotations

import os
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.records import (
    RejectionRecord,
    Spans,
    fold_records,
    fold_stream,
    folding,
    make_record,
    read_records,
    spool,
)
from buleyean_rl.data.records.folding import write_folded
from buleyean_rl.errors import RecordError
from drawn import drawn_records

Contents = dict[object, dict[tuple[str, Spans], tuple[int, int]]]

REJECTING = attrgetter("rejects")  # what is written where accepted answers are not kept


def contents(records: list[RejectionRecord]) -> Contents:
    """What records say, whatever their order."""
    return {
        record.prompt: {(answer.text, answer.spans): (answer.count, answer.rounds) for answer in record.entries()}
        for record in records
    }


def test_an_answer_has_the_rounds_of_its_own_records() -> None:
    (merged,) = fold_records([make_record("p", ["a"]), make_record("p", ["a"]), make_record("p", ["b"])])
    assert merged == RejectionRecord("p", ("a", "b"), (2, 1), (2, 1), ((), ()))
    bad = [make_record("p", [f"answer {k}"]) for k in range(30)]
    (merged,) = fold_records(bad)
    assert set(zip(merged.rejection_counts, merged.rounds, strict=True)) == {(1, 1)}


def accepted(prompt: str, answer: str, rounds: int = 1) -> RejectionRecord:
    return make_record(prompt, [answer], [0], rounds)


def test_likes_of_a_rejected_answer_are_rounds_of_it_and_others_are_left_out(tmp_path: Path) -> None:
    likes = [accepted("p", "owl")] * 9
    records = [*likes[:4], make_record("p", ["owl"]), *likes[4:], accepted("p", "hen"), accepted("q", "owl", 2)]
    report = write_folded(tmp_path / "r.jsonl", records, is_kept=REJECTING)
    assert list(read_records(tmp_path / "r.jsonl")) == [make_record("p", ["owl"], [1], 10)]
    assert (report.records, report.answers, report.answers_folded, report.prompts_repeated) == (1, 1, 0, 0)
    assert (report.accepted, report.rounds_won) == (0, 9)
    with pytest.raises(RecordError, match="nothing was written"):
        write_folded(tmp_path / "none.jsonl", likes, is_kept=REJECTING)


def test_answers_that_nobody_rejected_stay_as_anchors(tmp_path: Path) -> None:
    records = [accepted("p", "owl"), make_record("p", ["owl"]), accepted("p", "hen"), accepted("q", "owl", 2)]
    expected = [make_record("p", ["owl", "hen"], [1, 0], rounds=[2, 1]), accepted("q", "owl", 2)]
    report = write_folded(tmp_path / "r.jsonl", records)
    assert list(read_records(tmp_path / "r.jsonl")) == list(fold_stream(records)) == fold_records(records) == expected
    assert (report.records, report.rejections, report.answers, report.accepted) == (2, 1, 1, 2)
    assert (report.answers_folded, report.prompts_repeated, report.rounds_won) == (1, 2, 0)


def test_likes_of_an_answer_with_a_rejected_part_are_on_the_whole_of_it() -> None:
    (merged,) = fold_records([make_record("p", ["a bc"], spans=[[[2, 4]]]), accepted("p", "a bc", 3)])
    assert merged == make_record("p", ["a bc", "a bc"], [1, 0], spans=[[[2, 4]], []], rounds=[1, 3])


def test_merged_counts_stay_within_what_a_record_can_say(tmp_path: Path) -> None:
    most = 2**31 - 1
    records = [make_record("p", ["a", "b"], [most, 1], rounds=[most, 9]), make_record("p", ["a"], [1], 2)]
    report = write_folded(tmp_path / "r.jsonl", records)
    (merged,) = read_records(tmp_path / "r.jsonl")
    assert merged.rounds == (most, 9)
    assert most - 2 <= merged.rejection_counts[0] <= most
    assert merged.rejection_counts[1] == 1
    assert report.bounded == 1
    with pytest.raises(RecordError, match="add up to more than 2147483647"):
        make_record("p", ["a", "a"], [most, most], most)


def test_what_drew_the_answers_stays_where_it_is_the_same() -> None:
    def drawn(text: str, tokenizer: str, temperature: float) -> RejectionRecord:
        policy = {"model": "m", "temperature": temperature}
        return make_record("p", [text], token_ids=[[7]], ended=[True], tokenizer=tokenizer, policy=policy)

    (same,) = fold_records([drawn("a", "t", 1.0), drawn("b", "t", 1.0)])
    assert (same.token_ids, same.ended) == (((7,), (7,)), (True, True))
    assert (same.tokenizer, same.policy) == ("t", {"model": "m", "temperature": 1.0})
    (other,) = fold_records([make_record("p", ["a"]), drawn("a", "t", 1.0), drawn("b", "u", 0.0)])
    assert (other.token_ids, other.ended) == (((7,), None), (True, True))
    assert (other.tokenizer, other.policy) == ("t", None)


@given(st.lists(drawn_records(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_folding_ignores_order_keeps_totals_and_is_the_same_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, records: list[RejectionRecord], random: object
) -> None:
    records = [*records, make_record("p", ["rejected"])]  # without a rejection no file is written
    folded = fold_records(records)
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert contents(fold_records(shuffled)) == contents(folded)
    assert fold_records(folded) == folded
    assert sum(sum(r.rejection_counts) for r in folded) == sum(sum(r.rejection_counts) for r in records)
    assert sum(sum(r.rounds) for r in folded) == sum(sum(r.rounds) for r in records)
    assert all(answer.count <= answer.rounds for r in folded for answer in r.entries())
    assert len({r.prompt for r in folded}) == len(folded)

    path = tmp_path_factory.mktemp("fold") / "r.jsonl"
    report = write_folded(path, iter(records))
    assert list(read_records(path)) == folded
    assert report.records == len(folded)
    assert report.rejections == sum(sum(r.rejection_counts) for r in folded)
    assert (report.answers, report.accepted) == tuple(map(sum, zip(*(r.count_answers() for r in folded), strict=True)))
    answers = [sum(len(r.rejected_responses) for r in some) for some in (records, folded)]
    assert report.answers_folded == answers[0] - answers[1]
    assert report.prompts_repeated == len(records) - len(folded)
    assert report.empty == sum(r.rejected_responses.count("") for r in folded)


def test_two_prompts_of_one_hash_stay_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "hash", lambda _: 7, raising=False)
    records = [make_record(prompt, ["a"]) for prompt in ("p", "q", "p")]
    report = write_folded(tmp_path / "r.jsonl", records)
    assert list(read_records(tmp_path / "r.jsonl")) == fold_records(records)
    assert (report.records, report.prompts_repeated) == (2, 1)


def test_a_like_of_another_text_of_the_same_hash_is_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "hash", lambda _: 7, raising=False)
    records = [accepted("q", "owl"), accepted("p", "hen"), make_record("p", ["owl"]), accepted("p", "owl")]
    report = write_folded(tmp_path / "r.jsonl", records, is_kept=REJECTING)
    assert list(read_records(tmp_path / "r.jsonl")) == [make_record("p", ["owl"], [1], 2)]
    assert report.rounds_won == 1


def test_prompts_stand_where_they_first_appeared_even_in_a_like_that_is_left_out(tmp_path: Path) -> None:
    records = [make_record("p", ["a"]), accepted("q", "b"), make_record("r", ["c"]), make_record("q", ["d"])]
    write_folded(tmp_path / "r.jsonl", records, is_kept=REJECTING)
    assert [record.prompt for record in read_records(tmp_path / "r.jsonl")] == ["p", "q", "r"]


def test_likes_of_texts_that_nobody_rejects_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RejectionRecord] = []
    read_one = spool.Spool.read

    def note(self: spool.Spool, place: spool.Place) -> RejectionRecord:
        read.append(read_one(self, place))
        return read[-1]

    monkeypatch.setattr(spool.Spool, "read", note)
    likes = [accepted(f"p{k}", "good") for k in range(100)]
    records = [make_record(f"p{k}", ["bad"]) for k in range(100)]
    report = write_folded(tmp_path / "r.jsonl", [*likes, *records, accepted("p7", "bad")], is_kept=REJECTING)
    assert (report.records, report.rounds_won) == (100, 1)
    assert read == [records[7], accepted("p7", "bad")]


def test_a_prompt_with_more_labels_than_fit_is_folded_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [accepted("p", "ab"[k % 2]) if k % 3 else make_record("p", ["abcd"[k % 4]], [1], 1) for k in range(50)]
    reports = []
    for name, size in (("whole", 4096), ("parts", 7)):
        monkeypatch.setattr(folding, "GROUP_RECORDS", size)
        for is_kept in (folding.keep_all, REJECTING):
            reports.append(write_folded(tmp_path / f"{name}-{is_kept is REJECTING}", labels, is_kept=is_kept))
    assert reports[:2] == reports[2:]
    assert reports[1].rounds_won > 0
    for kind in ("True", "False"):
        assert (tmp_path / f"whole-{kind}").read_bytes() == (tmp_path / f"parts-{kind}").read_bytes()


def test_likes_of_several_answers_in_one_record_are_a_round_of_each(tmp_path: Path) -> None:
    likes = RejectionRecord("p", ("a", "b", "c", "a"), (0,) * 4, (2,) * 4, ((),) * 4)
    report = write_folded(tmp_path / "r.jsonl", [likes, make_record("p", ["a", "b"])], is_kept=REJECTING)
    assert list(read_records(tmp_path / "r.jsonl")) == [make_record("p", ["a", "b"], [1, 1], rounds=[5, 3])]
    assert report.rounds_won == 3


def test_the_limit_counts_records_and_none_at_all_write_nothing(tmp_path: Path) -> None:
    records = [make_record(prompt, ["a"]) for prompt in ("p", "p", "q", "r")]
    assert write_folded(tmp_path / "r.jsonl", records, limit=2).records == 2
    assert [r.prompt for r in read_records(tmp_path / "r.jsonl")] == ["p", "q"]
    with pytest.raises(RecordError, match="nothing was written"):
        write_folded(tmp_path / "none.jsonl", [])
    with pytest.raises(RecordError, match="nothing was written"):  # the limit may be reached before a rejection
        write_folded(tmp_path / "none.jsonl", [make_record("p", ["a"], [0], 1), *records], limit=1)
    assert os.listdir(tmp_path) == ["r.jsonl"]
