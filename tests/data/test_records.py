"""Records: every check, reading and writing, and what validation counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.records import (
    RejectionRecord,
    format_record,
    make_record,
    parse_record,
    read_records,
    records_sha256,
    write_folded,
    write_records,
)
from buleyean_rl.errors import RecordError, UsageError
from drawn import drawn_records, write_rows

GOOD = {"prompt": "Hi", "rejected_responses": ["No.", "Go."], "rejection_counts": [45, 12], "total_rounds": 60}
RECORD = RejectionRecord("Hi", ("No.", "Go."), (45, 12), (60, 60), ((), ()))
DRAWN = GOOD | {
    "token_ids": [[1, 2], None],
    "ended": [False, None],
    "tokenizer": "a hash",
    "policy": {"model": "m", "adapter": None, "temperature": 0.7},
}


# --- one record


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"rejected_spans": None, "model": "unknown keys are ignored"},
        {"prompt": "Hi", "rejectedResponses": ["No.", "Go."], "rejectionCounts": [45, 12], "totalRounds": 60},
        {k: v for k, v in GOOD.items() if k != "prompt"} | {"messages": [{"role": "user", "content": "Hi"}]},
        GOOD | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    ],
)
def test_every_spelling_reads_the_same(row: dict[str, object]) -> None:
    assert parse_record(row) == RECORD


def test_the_cards_rejected_has_no_counts() -> None:
    assert parse_record({"prompt": "Hi", "rejected": "No."}) == make_record("Hi", ["No."], [1], 1)
    twice = make_record("Hi", ["No.", ""], [2, 1], rounds=[2, 1])
    assert parse_record({"prompt": "Hi", "rejected": ["No.", "", "No."]}) == twice


def test_a_conversation_stays_one() -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    record = make_record(turns, ["No."])
    assert record.prompt == (("system", "Be kind."), ("user", "Hi"))
    assert json.loads(format_record(record))["messages"] == turns


def test_one_t_for_all_is_that_of_each_text() -> None:
    assert make_record("p", ["a", "b"], [3, 5]).rounds == (5, 5)
    assert make_record("p", ["a", "b", "a"], [3, 5, 4]) == RejectionRecord("p", ("a", "b"), (7, 5), (7, 5), ((), ()))
    assert make_record("p", ["a", "a"], [1, 1], 1).rounds == (2,)
    assert make_record("p", ["a", "a"], [1, 1], 60).rounds == (60,)
    assert make_record("p", ["a", "b", "a"], [1, 0, 2]).rejection_counts == (3, 0)


def test_labels_of_one_text_are_rounds_of_it() -> None:
    record = make_record("p", ["a", "b", "a"], [1, 1, 0], rounds=[1, 1, 9])
    assert record == RejectionRecord("p", ("a", "b"), (1, 1), (10, 1), ((), ()))
    assert json.loads(format_record(record))["rounds"] == [10, 1]


def test_one_t_for_all_cuts_the_spans_of_a_text_where_they_overlap() -> None:
    record = make_record("p", ["abcde", "abcde", "abcde", "f"], [20, 30, 5, 60], 60, [[[0, 2]], [[1, 3]], [[4, 5]], []])
    assert {(answer.count, answer.rounds, answer.spans) for answer in record.entries() if answer.text != "f"} == {
        (20, 60, ((0, 1),)),
        (50, 60, ((1, 2),)),
        (30, 60, ((2, 3),)),
        (5, 60, ((4, 5),)),
    }
    assert parse_record(json.loads(format_record(record))) == record
    whole = make_record("p", ["abc", "abc", "abc"], [1, 2, 2], 3, [[[0, 1]], [[1, 3]], [[0, 1]]])
    assert [(answer.count, answer.rounds, answer.spans) for answer in whole.entries()] == [
        (3, 3, ((0, 1),)),
        (2, 3, ((1, 3),)),
    ]
    assert make_record("p", ["ab", "ab"], [1, 1], 3, [[[0, 1]], [[1, 2]]]) == make_record("p", ["ab"], [1], 3)


spans_of_eight = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda span: span[0] < span[1]), max_size=3
)


judged_spans = st.lists(st.tuples(st.integers(0, 9), spans_of_eight), min_size=1, max_size=4)


@given(judged_spans.filter(lambda rows: any(count for count, _ in rows)))
def test_one_t_for_all_keeps_the_count_of_every_character(rows: list[tuple[int, list[tuple[int, int]]]]) -> None:
    def counts_at(entries: list[tuple[int, list[tuple[int, int]]]]) -> list[int]:
        return [sum(c for c, spans in entries if not spans or any(a <= i < b for a, b in spans)) for i in range(8)]

    record = make_record("p", ["a b c d "] * len(rows), [c for c, _ in rows], 9, [spans for _, spans in rows])
    parts = [(answer.count, list(answer.spans)) for answer in record.entries()]
    assert counts_at(parts) == counts_at(rows)
    assert all(answer.rounds == max(9, answer.count) for answer in record.entries())
    assert parse_record(json.loads(format_record(record))) == record


def test_what_drew_the_answers_is_read_and_written() -> None:
    record = parse_record(DRAWN)
    assert (record.token_ids, record.ended) == (((1, 2), None), (False, None))
    assert (record.tokenizer, record.policy) == ("a hash", {"model": "m", "adapter": None, "temperature": 0.7})
    assert json.loads(format_record(record)) == DRAWN
    assert json.loads(format_record(RECORD)) == GOOD


def test_a_line_of_a_later_version_is_refused_and_one_that_needs_this_one_says_so() -> None:
    assert "format_version" not in json.loads(format_record(RECORD))
    row = json.loads(format_record(make_record("p", ["a", "b"], [1, 1], rounds=[1, 2])))
    assert row["format_version"] == 2
    assert parse_record(row).rounds == (1, 2)
    with pytest.raises(RecordError, match=r"records format 3, of a later version of buleyean-rl: update it"):
        parse_record(row | {"format_version": 3})


def test_spans_are_characters_sorted_and_merged_and_keep_answers_apart() -> None:
    record = make_record("p", ["abcdefgh", "🙂é"], None, None, [[[5, 7], [0, 2], [2, 3], [1, 2]], [[1, 2]]])
    assert record.rejected_spans == (((0, 3), (5, 7)), ((1, 2),))
    record = make_record("p", ["abc", "abc", "abc"], [1, 1, 1], 3, [[[0, 1]], [[2, 3]], [[0, 1]]])
    assert record.rejected_responses == ("abc", "abc")
    assert record.rejection_counts == (2, 1)
    assert record.rejected_spans == (((0, 1),), ((2, 3),))


def test_half_a_surrogate_pair_is_replaced_wherever_text_comes_in() -> None:
    half = "cut \ud83d"
    record = make_record(
        [{"role": "system", "content": half}, {"role": "user", "content": "q"}],
        [half, "\ud83d\ude00"],
        spans=[[[4, 5]], []],
    )
    assert record.prompt[0] == ("system", "cut \ufffd")
    assert record.rejected_responses == ("cut \ufffd", "\U0001f600")
    assert record.rejected_spans == (((4, 5),), ())
    assert parse_record(json.loads(format_record(record))) == record


BAD_FIELDS = {
    "prompt": [
        (" \n", "the prompt is empty"),
        (7, "prompt is the number 7"),
        (None, "has no prompt"),
        ([], "an empty list"),
        ([{"role": "user", "content": " "}], "every message is blank"),
        ([{"role": "assistant", "content": "Yes?"}], "ends with an assistant message"),
        ([{"content": "Hi"}], "has no role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of the kind 'image'"),
        (["Hi"], r"prompt\[0\] is text"),
    ],
    "messages": [([{"role": "user", "content": "Hi"}], "both 'prompt' and 'messages'")],
    "rejected_responses": [
        ([], "rejected_responses is empty"),
        (None, "has no rejected_responses"),
        ({"a": 1}, "rejected_responses is an object"),
        (["No.", "  \n"], r"rejected_responses\[1\] is only whitespace"),
        (["No.", True], r"rejected_responses\[1\] is true"),
        (["No."], "rejection_counts has 2 entries for 1 rejected_responses"),
    ],
    "rejection_counts": [
        ([61, 1], "a rejection count is 61 but total_rounds is 60"),
        ([-2, 1], r"rejection_counts\[0\] is the number -2"),
        ([1.0, 1], r"rejection_counts\[0\] is the number 1.0"),
        ([True, 1], r"rejection_counts\[0\] is true"),
        (3, "rejection_counts is the number 3"),
    ],
    "total_rounds": [(0, "must be between 1 and"), (2**31, "must be between 1 and"), (10**5000, "a huge number")],
    "rounds": [
        ([60, 60], "both 'rounds' and 'total_rounds'"),
    ],
    "token_ids": [
        ([[1], [2]], "token_ids but no tokenizer"),
        ([[1]], "token_ids has 1 entry for 2"),
        ([[1], "2"], r"token_ids\[1\] is text"),
        ([[1], [-2]], r"token_ids\[1\]\[0\] is the number -2"),
    ],
    "ended": [([True], "ended has 1 entry for 2"), ([True, 1], r"ended\[1\] is the number 1")],
    "tokenizer": [(7, "tokenizer is the number 7")],
    "policy": [("greedy", "policy is text"), ({"model": ["m"]}, r"policy\['model'\] is a list")],
    "format_version": [("2", "format_version is text")],
    "rejected_spans": [
        ([[]], "rejected_spans has 1 entry for 2"),
        ({}, "rejected_spans is an object"),
        ([[], None], r"rejected_spans\[1\] is null"),
        ([[[1, 1]], []], r"rejected_spans\[0\]\[0\] is \[1, 1\]"),
        ([[[0, 4]], []], "the answer has 3 characters: it needs 0 <= start < end <= 3"),
        ([[[-1, 2]], []], r"\[-1, 2\]"),
        ([[[False, True]], []], "two whole numbers"),
        ([[[0]], []], "two whole numbers"),
    ],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_bad_field_is_named_with_what_is_wrong(field: str) -> None:
    for value, problem in BAD_FIELDS[field]:
        with pytest.raises(RecordError, match=problem):
            parse_record(GOOD | {field: value})


def test_context_beside_the_prompt_is_refused() -> None:
    for context in ({"system": "Be brief."}, {"system_prompt": "Be brief."}, {"history": [["Hi", "Hello."]]}):
        with pytest.raises(RecordError, match=f"has its {next(iter(context))} beside the prompt: `data import`"):
            parse_record(GOOD | context)
    assert parse_record(GOOD | {"system": "", "history": []}) == RECORD


# --- files


@given(st.lists(drawn_records(), min_size=1, max_size=4))
def test_writing_and_reading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, records: list[RejectionRecord]
) -> None:
    path = tmp_path_factory.mktemp("round") / "r.jsonl"
    assert write_records(path, records) == len(records)
    assert list(read_records(path)) == records


def test_reading_streams(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", GOOD)
    with path.open("a") as file:
        file.write("broken\n")
    stream = read_records(path)
    assert next(stream) == RECORD
    with pytest.raises(RecordError, match=r"r\.jsonl:2: is not valid JSON"):
        next(stream)


def test_bom_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode())
    assert list(read_records(path)) == [RECORD] * 2
    assert records_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_cannot_hold_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for content, problem in (
        (b"\xef\xbb\xbf\n \n", "is empty"),
        (b"GGUF\x03\0\0\0", "is a binary file"),
        (b"PK\x03\x04zip", "is a binary file"),
        ('{"prompt": "Hi"}'.encode("utf-16"), "is UTF-16"),
        (b'[\n{"prompt": "Hi"}]', "is a JSON list"),
    ):
        path.write_bytes(content)
        for skip_bad in (False, True):
            with pytest.raises(RecordError, match=problem) as caught:
                list(read_records(path, skip_bad=skip_bad))
            assert str(caught.value).startswith(str(path))
    for path, problem in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(RecordError, match=problem):
            list(read_records(path))


def test_a_bad_line_is_refused_with_its_place_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    good = json.dumps(GOOD).encode()
    for line, problem in (
        (b'{"prompt": "Hi"', "is not valid JSON"),
        (b'{"prompt": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"7", "is the number 7: each line must be one JSON object"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "Hi", "rejected": " "}', "only whitespace"),
    ):
        path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
        with pytest.raises(RecordError, match=problem) as caught:
            list(read_records(path))
        assert (caught.value.path, caught.value.line) == (path, 3)
        errors: list[RecordError] = []
        assert len(list(read_records(path, skip_bad=errors.append))) == 2
        assert [error.line for error in errors] == [3]
    with pytest.raises(RecordError, match="every line is bad"):
        list(read_records(write_rows(path, {"prompt": "Hi"}, {}), skip_bad=True))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", GOOD)
    before = path.read_bytes()

    def failing() -> object:
        yield RECORD
        raise RecordError("enough")

    for write in (write_records, write_folded):
        with pytest.raises(RecordError, match="enough"):
            write(path, failing())  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for target, problem in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "r.jsonl", "create the folder"),
    ):
        with pytest.raises(UsageError, match=problem):
            write_records(target, [RECORD])
    assert os.listdir(tmp_path) == []


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    write_records(tmp_path / "link.jsonl", [RECORD])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert list(read_records(tmp_path / "real.jsonl")) == [RECORD]


@pytest.mark.parametrize("write", [write_records, write_folded])
def test_a_pipe_gets_the_records(tmp_path: Path, write: Callable[..., object]) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        lines = pool.submit(pipe.read_text)
        write(pipe, [RECORD])
        assert lines.result(timeout=10) == format_record(RECORD) + "\n"
    assert pipe.is_fifo()


# --- prompts
