"""What validation of a records file counts, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

from buleyean_rl.data.records import RejectionRecord, validate_records
from buleyean_rl.data.records.validation import MeasuredRecord
from drawn import write_rows


def test_validation_counts_everything(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "r.jsonl",
        {"prompt": "p", "rejected": ["a", "a", ""]},
        {"prompt": "p", "rejected": ["b"]},
        {"prompt": "q", "rejected": [""]},
        {"prompt": "q", "rejected": [" "]},
    )
    report = validate_records(path)
    assert (report.rows, report.records, report.bad) == (4, 3, 1)
    assert (report.rejections, report.duplicates, report.repeated_prompts) == (5, 1, 1)
    assert (report.empty, report.dropped) == (2, 1)
    assert report.errors == [
        f'{path}:4: rejected_responses[0] is only whitespace: remove it, or write "" if the answer was empty'
    ]
    assert not report.usable
    assert report.tokens is None
    assert json.loads(json.dumps(report.as_dict()))["usable"] is False


def test_a_key_that_stands_twice_is_found_in_linear_time(tmp_path: Path) -> None:
    keys = "".join(f'"k{number}": 0, ' for number in range(100_000))
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{{keys}"last": 1, "last": 2}}\n')
    (error,) = validate_records(path).errors
    assert "the key 'last' stands twice" in error


def test_validation_says_that_all_answers_are_empty(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", {"prompt": "Hi", "rejected": [""]}, {"prompt": "Hi", "rejected": ""})
    report = validate_records(path)
    assert not report.usable
    assert "not usable: all answers are empty, with no token to reject" in report.lines()[0]


def test_validation_says_how_many_records_only_anchor(tmp_path: Path) -> None:
    anchor = {"prompt": "Hi", "rejected_responses": ["Yes."], "rejection_counts": [0]}
    mixed = {"prompt": "Hm", "rejected_responses": ["No.", "Yes."], "rejection_counts": [1, 0]}
    lost = {"prompt": "Hm", "rejected_responses": ["", "Yes."], "rejection_counts": [1, 0]}
    report = validate_records(write_rows(tmp_path / "r.jsonl", anchor, mixed, lost))
    assert (report.answers, report.accepted, report.anchors, report.dropped, report.rejecting) == (2, 3, 1, 1, 1)
    assert report.usable
    assert "  records of accepted answers alone: 1" in report.lines()
    none = validate_records(write_rows(tmp_path / "r.jsonl", anchor))
    assert (none.dropped, none.usable) == (0, False)
    assert "not usable: nothing in it is rejected: a file needs one rejection" in none.lines()[0]
    assert not validate_records(write_rows(tmp_path / "r.jsonl", anchor, lost)).usable


def test_validation_counts_tokens(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "r.jsonl",
        {"prompt": "12345", "rejected": ["abc", "abcdefg"]},
        {"prompt": "1234567", "rejected_responses": ["abcdef"], "rejected_spans": [[[4, 6]]]},
        {"prompt": "0123456789", "rejected": ["a"]},
    )

    def measure(record: RejectionRecord) -> MeasuredRecord:
        """A tokenizer of one token per character."""
        answers = [
            [not spans or any(a <= i < b for a, b in spans) for i in range(len(text))]
            for text, spans in zip(record.rejected_responses, record.rejected_spans, strict=True)
        ]
        return MeasuredRecord(len(record.prompt), [(len(answer), answer) for answer in answers], {"notes": 1})

    report = validate_records(path, measure=measure, max_length=10)
    assert report.tokens is not None
    tokens = report.tokens
    assert (tokens.prompts, tokens.responses) == (12, 16)
    assert (tokens.longest_prompt, tokens.longest_response) == (10, 7)
    assert (tokens.truncated, tokens.cut, tokens.over_length) == (2, 5, 1)
    assert tokens.notes == {"notes": 3}
    assert report.dropped == 2, "one prompt leaves no room, and one answer's span was cut off"
    assert report.usable
    assert not validate_records(path, measure=measure, max_length=5).usable


def test_a_file_of_another_format_is_sent_to_data_import(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"prompt": "Hi", "response": "Go.", "rating": "down"}\n')
    lines = validate_records(tmp_path / "log.jsonl").lines()
    assert "no line is a record: see `buleyean data import`" in lines[0]
    assert "`buleyean data import` makes records of other formats" in lines[-1]
