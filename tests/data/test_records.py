"""Records: every check, folding, reading and writing."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.data.records import (
    RejectionRecord,
    Spans,
    accumulate_records,
    fold_records,
    format_record,
    make_record,
    merge_records,
    parse_record,
    read_records,
    records_sha256,
    validate_records,
    write_folded,
    write_records,
)
from buleyean_rl.errors import RecordError

GOOD = {"prompt": "Hi", "rejected_responses": ["No.", "Go."], "rejection_counts": [45, 12], "total_rounds": 60}

# --- what hypothesis draws: any text a file can hold, few enough prompts and answers to meet each other

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
filled = texts.filter(str.strip)
answers = st.one_of(st.just(""), st.sampled_from(["a", "ab", "abc"]), filled)
message = st.tuples(st.sampled_from(["user", "system", "assistant"]), texts)
conversations = st.lists(message, max_size=3).map(lambda turns: (*turns, ("user", "and now?")))
prompts = st.one_of(st.sampled_from(["p", "q"]), filled, conversations.filter(lambda turns: len(turns) > 1))


@st.composite
def records(draw: st.DrawFn) -> RejectionRecord:
    prompt = draw(prompts)
    responses = draw(st.lists(answers, min_size=1, max_size=4))
    counts = draw(st.lists(st.integers(1, 9), min_size=len(responses), max_size=len(responses)))
    spans = []
    for response in responses:
        pairs = st.tuples(st.integers(0, len(response)), st.integers(0, len(response)))
        drawn = draw(st.lists(pairs, max_size=3)) if response else []
        spans.append([list(pair) for pair in drawn if pair[0] < pair[1]])
    rounds = draw(st.none() | st.integers(max(counts), 99))
    if not isinstance(prompt, str):
        prompt = [{"role": role, "content": content} for role, content in prompt]
    return make_record(prompt, responses, counts, rounds, spans)


def meaning(folded: list[RejectionRecord]) -> dict[object, tuple[int, Counter[tuple[str, Spans]]]]:
    """What a set of records says, whatever its order."""
    return {
        record.prompt: (
            record.total_rounds,
            Counter(
                dict(
                    zip(
                        zip(record.rejected_responses, record.rejected_spans, strict=True),
                        record.rejection_counts,
                        strict=True,
                    )
                )
            ),
        )
        for record in folded
    }


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- one record


def test_the_canonical_line_reads_as_it_says() -> None:
    assert parse_record(GOOD) == RejectionRecord("Hi", ("No.", "Go."), (45, 12), 60, ((), ()))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "rejectedResponses": ["No.", "Go."], "rejectionCounts": [45, 12], "totalRounds": 60},
        {**GOOD, "rejected_spans": [[], []], "model": "unknown keys are ignored"},
        {**GOOD, "rejected_spans": None},
        {k: v for k, v in GOOD.items() if k != "prompt"} | {"messages": [{"role": "user", "content": "Hi"}]},
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    ],
)
def test_other_spellings_mean_the_same(row: dict[str, object]) -> None:
    assert parse_record(row) == parse_record(GOOD)


def test_the_cards_rejected_has_no_counts() -> None:
    assert parse_record({"prompt": "Hi", "rejected": "No."}) == make_record("Hi", ["No."], [1], 1)
    assert parse_record({"prompt": "Hi", "rejected": ["No.", "Go.", "No."]}) == make_record(
        "Hi", ["No.", "Go."], [2, 1], 2
    )


def test_a_conversation_stays_one() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    record = make_record(turns, ["No."])
    assert record.prompt == (("system", "Be kind."), ("user", "Hi"))
    assert json.loads(format_record(record))["messages"] == turns


def test_rounds_are_derived_and_grow_with_folding() -> None:
    assert make_record("p", ["a", "b"], [3, 5]).total_rounds == 5
    assert make_record("p", ["a", "b", "a"], [3, 5, 4]) == RejectionRecord("p", ("a", "b"), (7, 5), 7, ((), ()))
    assert make_record("p", ["a", "a"], [1, 1], 1).total_rounds == 2
    assert make_record("p", ["a", "a"], [1, 1], 60).total_rounds == 60


def test_spans_are_sorted_and_merged() -> None:
    record = make_record("p", ["abcdefgh", "x"], None, None, [[[5, 7], [0, 2], [2, 3], [1, 2]], []])
    assert record.rejected_spans == (((0, 3), (5, 7)), ())


def test_spans_count_characters() -> None:
    assert make_record("p", ["🙂é"], None, None, [[[1, 2]]]).rejected_spans == (((1, 2),),)


def test_one_text_with_two_span_lists_stays_two_answers() -> None:
    record = make_record("p", ["abc", "abc", "abc"], [1, 1, 1], 3, [[[0, 1]], [[2, 3]], [[0, 1]]])
    assert record.rejected_responses == ("abc", "abc")
    assert record.rejection_counts == (2, 1)
    assert record.rejected_spans == (((0, 1),), ((2, 3),))


def test_an_empty_answer_is_a_rejection_too() -> None:
    assert make_record("p", [""]).rejected_responses == ("",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 7}, "prompt is the number 7"),
        ({"prompt": None}, "has no prompt"),
        ({"prompt": []}, "an empty list"),
        ({"prompt": [{"role": "user", "content": " "}]}, "every message is blank"),
        ({"prompt": [{"role": "assistant", "content": "Yes?"}]}, "ends with an assistant message"),
        ({"prompt": [{"content": "Hi"}]}, "has no role"),
        ({"prompt": [{"role": "user", "content": None}]}, r"prompt\[0\].content is null"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content is a list"),
        ({"prompt": ["Hi"]}, r"prompt\[0\] is text"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "both 'prompt' and 'messages'"),
        ({"rejectedResponses": ["No."]}, "both 'rejected_responses' and 'rejectedResponses'"),
        ({"rejected_responses": []}, "rejected_responses is empty"),
        ({"rejected_responses": None}, "has no rejected_responses"),
        ({"rejected_responses": {"a": 1}}, "rejected_responses is an object"),
        ({"rejected_responses": ["No.", "  \n"]}, r"rejected_responses\[1\] is only whitespace"),
        ({"rejected_responses": ["No.", True]}, r"rejected_responses\[1\] is true"),
        ({"rejected_responses": ["No."]}, "rejection_counts has 2 entries for 1 rejected_responses"),
        ({"rejection_counts": [61, 1]}, "a rejection count is 61 but total_rounds is 60"),
        ({"rejection_counts": [0, 0]}, "every rejection count is 0"),
        ({"rejection_counts": [-2, 1]}, r"rejection_counts\[0\] is the number -2"),
        ({"rejection_counts": [1.0, 1]}, r"rejection_counts\[0\] is the number 1.0"),
        ({"rejection_counts": [True, 1]}, r"rejection_counts\[0\] is true"),
        ({"rejection_counts": ["3", 1]}, r"rejection_counts\[0\] is text"),
        ({"rejection_counts": 3}, "rejection_counts is the number 3"),
        ({"total_rounds": 0}, "total_rounds is the number 0"),
        ({"total_rounds": 60.0}, "total_rounds is the number 60.0"),
        ({"total_rounds": 2**31}, "it must be between 1 and"),
        ({"total_rounds": 10**5000}, "a huge number"),
        ({"rejected_spans": [[]]}, "rejected_spans has 1 entries for 2"),
        ({"rejected_spans": {}}, "rejected_spans is an object"),
        ({"rejected_spans": [[], None]}, r"rejected_spans\[1\] is null"),
        ({"rejected_spans": [[[1, 1]], []]}, r"rejected_spans\[0\]\[0\] is \[1, 1\]"),
        ({"rejected_spans": [[[2, 1]], []]}, "0 <= start < end <= 3"),
        ({"rejected_spans": [[[0, 4]], []]}, "the answer has 3 characters"),
        ({"rejected_spans": [[[-1, 2]], []]}, r"\[-1, 2\]"),
        ({"rejected_spans": [[[0, 1.0]], []]}, "two whole numbers"),
        ({"rejected_spans": [[[False, True]], []]}, "two whole numbers"),
        ({"rejected_spans": [[[0]], []]}, "two whole numbers"),
    ],
)
def test_a_bad_record_says_what_is_wrong(change: dict[str, object], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        parse_record({**GOOD, **change})


# --- folding


def test_two_records_of_one_round_make_two_rounds() -> None:
    same = merge_records([make_record("p", ["a"]), make_record("p", ["a"])])
    assert same == RejectionRecord("p", ("a",), (2,), 2, ((),))
    other = merge_records([make_record("p", ["a"]), make_record("p", ["b"])])
    assert other == RejectionRecord("p", ("a", "b"), (1, 1), 2, ((), ()))


@given(st.lists(records(), max_size=6), st.randoms(use_true_random=False))
def test_folding_ignores_order_and_keeps_totals(drawn: list[RejectionRecord], random: object) -> None:
    folded = fold_records(drawn)
    shuffled = list(drawn)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert meaning(fold_records(shuffled)) == meaning(folded)
    assert fold_records(folded) == folded
    assert sum(sum(r.rejection_counts) for r in folded) == sum(sum(r.rejection_counts) for r in drawn)
    assert sum(r.total_rounds for r in folded) == sum(r.total_rounds for r in drawn)
    assert all(max(r.rejection_counts) <= r.total_rounds for r in folded)
    assert len({r.prompt for r in folded}) == len(folded)


@given(st.lists(records(), min_size=1, max_size=6))
def test_folding_through_a_file_is_folding_in_memory(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[RejectionRecord]
) -> None:
    path = tmp_path_factory.mktemp("fold") / "r.jsonl"
    report = write_folded(path, iter(drawn))
    folded = fold_records(drawn)
    assert list(read_records(path)) == folded
    assert report.records == len(folded)
    assert report.rejections == sum(sum(r.rejection_counts) for r in folded)
    assert report.answers == sum(len(r.rejected_responses) for r in folded)
    assert report.answers_folded == sum(len(r.rejected_responses) for r in drawn) - report.answers
    assert report.prompts_repeated == len(drawn) - len(folded)
    assert report.empty == sum(r.rejected_responses.count("") for r in folded)


def test_two_prompts_of_one_hash_stay_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from buleyean_rl.data.records import files

    monkeypatch.setattr(files, "hash", lambda _: 7, raising=False)
    drawn = [make_record(prompt, ["a"]) for prompt in ("p", "q", "p")]
    report = write_folded(tmp_path / "r.jsonl", drawn)
    assert list(read_records(tmp_path / "r.jsonl")) == fold_records(drawn)
    assert (report.records, report.prompts_repeated) == (2, 1)


def test_the_limit_counts_records(tmp_path: Path) -> None:
    drawn = [make_record(prompt, ["a"]) for prompt in ("p", "p", "q", "r")]
    assert write_folded(tmp_path / "r.jsonl", drawn, limit=2).records == 2
    assert [r.prompt for r in read_records(tmp_path / "r.jsonl")] == ["p", "q"]


# --- files


@given(st.lists(records(), min_size=1, max_size=4))
def test_writing_and_reading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[RejectionRecord]
) -> None:
    path = tmp_path_factory.mktemp("round") / "r.jsonl"
    assert write_records(path, drawn) == len(drawn)
    assert list(read_records(path)) == drawn


def test_reading_streams(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", GOOD)
    with path.open("a") as file:
        file.write("broken\n")
    stream = read_records(path)
    assert next(stream) == parse_record(GOOD)
    with pytest.raises(RecordError, match=r"r\.jsonl:2: is not valid JSON"):
        next(stream)


def test_bom_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode())
    assert list(read_records(path)) == [parse_record(GOOD)] * 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"GGUF\x03\0\0\0", "is a binary file"),
        (b"PK\x03\x04zip", "is a binary file"),
        ('{"prompt": "Hi"}'.encode("utf-16"), "is UTF-16"),
        (b'[\n{"prompt": "Hi"}]', "is a JSON list"),
    ],
)
def test_a_file_that_cannot_hold_records_says_so(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(RecordError, match=problem) as caught:
            list(read_records(path, skip_bad=skip_bad))
        assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(RecordError, match="is a folder"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "Hi"', "is not valid JSON"),
        (b'{"prompt": NaN}', "NaN is no JSON number"),
        (b'{"prompt": -Infinity}', "-Infinity is no JSON number"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b'"Hi"', "is text: each line must be one JSON object"),
        (b"7", "is the number 7"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "Hi", "rejected": " "}', "only whitespace"),
    ],
)
def test_a_bad_line_names_its_place_or_is_skipped(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "r.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    with pytest.raises(RecordError, match=problem) as caught:
        list(read_records(path))
    assert (caught.value.path, caught.value.line) == (path, 3)
    told: list[RecordError] = []
    assert len(list(read_records(path, skip_bad=told.append))) == 2
    assert [error.line for error in told] == [3]


def test_nothing_but_bad_lines_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", {"prompt": "Hi"}, {})
    with pytest.raises(RecordError, match="every line is bad"):
        list(read_records(path, skip_bad=True))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", GOOD)
    before = path.read_bytes()

    def failing() -> object:
        yield parse_record(GOOD)
        raise RecordError("enough")

    for write in (write_records, write_folded):
        with pytest.raises(RecordError, match="enough"):
            write(path, failing())  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_a_target_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    record = parse_record(GOOD)
    with pytest.raises(RecordError, match="is a folder"):
        write_records(tmp_path, [record])
    with pytest.raises(RecordError, match="create the folder"):
        write_records(tmp_path / "none" / "r.jsonl", [record])
    with pytest.raises(RecordError, match="not a regular file"):
        write_records("/dev/null", [record])
    with pytest.raises(RecordError, match="nothing was written"):
        write_folded(tmp_path / "r.jsonl", [])
    assert os.listdir(tmp_path) == []


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    write_records(tmp_path / "link.jsonl", [parse_record(GOOD)])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert list(read_records(tmp_path / "real.jsonl")) == [parse_record(GOOD)]


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", GOOD)
    assert records_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# --- looking at a file


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


def test_validation_counts_tokens(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "r.jsonl",
        {"prompt": "12345", "rejected": ["abc", "abcdefg"]},
        {"prompt": "1234567", "rejected_responses": ["abcdef"], "rejected_spans": [[[4, 6]]]},
        {"prompt": "0123456789", "rejected": ["a"]},
    )

    def measure(record: RejectionRecord) -> tuple[int, list[list[bool]]]:
        """A tokenizer of one token per character."""
        return len(record.prompt), [
            [not spans or any(a <= i < b for a, b in spans) for i in range(len(text))]
            for text, spans in zip(record.rejected_responses, record.rejected_spans, strict=True)
        ]

    report = validate_records(path, measure=measure, max_length=10)
    assert report.tokens is not None
    tokens = report.tokens
    assert (tokens.prompts, tokens.responses) == (12, 16)
    assert (tokens.longest_prompt, tokens.longest_response) == (10, 7)
    assert (tokens.truncated, tokens.cut, tokens.over_length) == (2, 5, 1)
    assert report.dropped == 2, "one prompt leaves no room, and one answer's span was cut off"
    assert report.usable
    assert not validate_records(path, measure=measure, max_length=5).usable


def test_an_answer_that_was_never_rejected_may_stand_beside_the_others(tmp_path: Path) -> None:
    record = make_record("Hi", ["No.", "Hello!", "No."], [1, 0, 2])
    assert (record.rejected_responses, record.rejection_counts, record.total_rounds) == (("No.", "Hello!"), (3, 0), 3)
    path = tmp_path / "records.jsonl"
    write_records(path, [record])
    assert list(read_records(path)) == [record]
    again = accumulate_records([record, record])
    assert (again[0].rejection_counts, again[0].total_rounds) == ((6, 0), 6)
