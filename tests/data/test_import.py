"""Importing: folding, counting, skipping, redacting; and every example of the data page."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.cli import main
from buleyean_rl.data.importers import import_records
from buleyean_rl.data.importers.formats import detect_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Discards
from buleyean_rl.data.importers.redact import redact_record, redact_text
from buleyean_rl.data.records import fold_records, make_record, read_records, write_records
from buleyean_rl.errors import RecordError, UsageError
from drawn import write_rows

PAIRS = [{"prompt": prompt, "chosen": "Yes.", "rejected": text} for prompt, text in ("p1", "q1", "p1", "p2")]
DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.skipif(not DATA_PAGE.exists(), reason="the readers' pages are not here")
def test_every_example_of_the_data_page_imports() -> None:
    page = DATA_PAGE.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.findall(r"^\{.*\}$", page, re.MULTILINE)]
    formats = [detect_format([row]) for row in rows]
    assert [row_format.name for row_format in formats] == [
        *["records"] * 2,
        *["pairs"] * 2,
        *["kto"] * 2,
        "candidates",
        "scored",
        *["traces"] * 2,
    ]
    records = [
        next(row_format.read_records(row, Discards(), NO_CHOICES))
        for row_format, row in zip(formats, rows, strict=True)
    ]
    assert records[1].rejected_responses[0][slice(*records[1].rejected_spans[0][0])] == "twice twice"
    assert records[-3] == make_record("Hi", ["Hm.", "Go."], [1, 2], 2)
    assert records[-1] == records[-2] == make_record("Hi", ["Go."])


def test_importing_folds_discards_and_reports(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", *PAIRS)
    report = import_records(str(source), tmp_path / "r.jsonl")
    assert list(read_records(tmp_path / "r.jsonl")) == [
        make_record("p", ["1", "2"], [2, 1], rounds=[2, 1]),
        make_record("q", ["1"]),
    ]
    assert (report.rows, report.records, report.rejections, report.answers) == (4, 2, 4, 3)
    assert (report.chosen_discarded, report.duplicates_folded, report.prompts_repeated) == (4, 1, 2)
    assert any("discarded: 4" in line for line in report.lines())
    assert json.loads(json.dumps(report.as_dict()))["format"] == "pairs"


def test_labels_of_one_text_are_rounds_of_it(tmp_path: Path) -> None:
    owl = {"prompt": "Name a bird.", "completion": "Owl."}
    hello = [{"prompt": "hello", "completion": f"Bad greeting {k}.", "label": False} for k in range(30)]
    rows = [
        *[{**owl, "label": True}] * 9,
        {**owl, "label": False},
        {**owl, "completion": "Hen.", "label": True},
        *hello,
    ]
    report = import_records(str(write_rows(tmp_path / "kto.jsonl", *rows)), tmp_path / "r.jsonl")
    bird, greeting = read_records(tmp_path / "r.jsonl")
    assert bird == make_record("Name a bird.", ["Owl."], [1], 10)
    assert set(zip(greeting.rejection_counts, greeting.rounds, strict=True)) == {(1, 1)}
    assert (report.chosen_discarded, report.rounds_won, report.without_rejection) == (1, 9, 10)


def trace(answer: str, value: int) -> dict[str, object]:
    return {"input": "Hi", "output": answer, "scores": [{"name": "user", "value": value}]}


@pytest.mark.parametrize("keep", [None, True, False])
@pytest.mark.parametrize("is_log", [True, False])
def test_accepted_answers_of_a_log_anchor_and_others_do_when_that_is_asked(
    tmp_path: Path, is_log: bool, keep: bool | None
) -> None:
    rows = [trace("No.", 0), trace("No.", 1), trace("Yes.", 1)]
    if not is_log:
        rows = [{"prompt": "Hi", "completion": row["output"], "label": row["scores"][0]["value"]} for row in rows]  # type: ignore[index]
    source = write_rows(tmp_path / "log.jsonl", *rows)
    report = import_records(str(source), tmp_path / "r.jsonl", keep_accepted=keep)
    (record,) = read_records(tmp_path / "r.jsonl")
    kept = is_log if keep is None else keep
    answers = (["No.", "Yes."], [1, 0]) if kept else (["No."], [1])
    assert record == make_record("Hi", *answers, rounds=[2, 1][: len(answers[0])])
    assert (report.answers, report.accepted, report.chosen_discarded) == (1, int(kept), int(not kept))
    assert ("  accepted answers kept as anchors: 1" in report.lines()) == kept


def test_records_without_a_rejection_are_imported_as_they_are(tmp_path: Path) -> None:
    records = [make_record("p", ["No."]), make_record("q", ["Write to me@x.org"], [0], 3)]
    write_records(tmp_path / "a.jsonl", records)
    report = import_records(str(tmp_path / "a.jsonl"), tmp_path / "r.jsonl")
    assert list(read_records(tmp_path / "r.jsonl")) == records
    assert (report.accepted, report.chosen_discarded) == (1, 0)
    assert import_records(str(tmp_path / "a.jsonl"), tmp_path / "r.jsonl", redact=True).redacted["email"] == 1  # type: ignore[index]
    assert import_records(str(tmp_path / "a.jsonl"), tmp_path / "r.jsonl", keep_accepted=False).chosen_discarded == 1
    assert list(read_records(tmp_path / "r.jsonl")) == records[:1]


def test_a_row_is_reported_once(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": str(label), "label": label} for label in (False, True, "--")]
    report = import_records(str(write_rows(tmp_path / "kto.jsonl", *rows)), tmp_path / "r.jsonl")
    assert report.lines()[0].endswith(f"3 rows -> 1 record, 1 rejection of 1 answer, in {tmp_path / 'r.jsonl'}")
    assert report.lines()[1:] == [
        "  chosen, accepted or never rejected answers discarded: 1",
        "  rows without a rating: 1",
    ]


def test_what_is_left_out_is_counted_by_its_reason(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "x"}}]}
    asked = {"role": "user", "content": "p"}
    rows = [
        {"messages": [asked, call], "label": False},
        {"messages": [asked, {"role": "assistant", "content": "No."}], "label": False, "context": "a page"},
        {"messages": [asked, {"role": "assistant", "content": "No."}], "label": float("nan")},
    ]
    report = import_records(str(write_rows(tmp_path / "a.jsonl", *rows)), tmp_path / "r.jsonl")
    reason = "the rejected answer is a call of a tool, not text"
    assert (report.unusable, report.context_dropped, report.unrated) == ({reason: 1}, {"context": 1}, 1)
    lines = "\n".join(report.lines())
    assert f"rows left out: {reason}: 1" in lines
    assert "rows without their context, which no prompt can hold: 1" in lines
    with pytest.raises(RecordError, match=f"nothing was written \\({reason}: 1\\)"):
        import_records(str(write_rows(tmp_path / "b.jsonl", rows[0])), tmp_path / "s.jsonl")


def test_importing_records_again_changes_nothing(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    source = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "p", "rejected_responses": ["No.", "No."], "rejection_counts": [1, 2], "total_rounds": 9},
        {"messages": messages, "rejected": ["abc"], "rejected_spans": [[[1, 2]]]},
    )
    assert import_records(str(source), tmp_path / "b.jsonl").duplicates_folded == 1
    import_records(str(tmp_path / "b.jsonl"), tmp_path / "b.jsonl")  # onto itself, too
    assert list(read_records(tmp_path / "b.jsonl")) == fold_records(read_records(source))


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ['{"prompt"', json.dumps(PAIRS[0]), '{"prompt": "p", "chosen": "a"}', json.dumps(PAIRS[1]), "7"]
    path.write_text("\n".join(rows), encoding="utf-8")
    report = import_records(str(path), tmp_path / "r.jsonl", skip_bad=True)
    assert (report.rows, report.records, report.skipped) == (5, 2, 3)
    assert [error.split(":")[1] for error in report.errors] == ["1", "5", "3"]  # `auto` reads ahead


def test_the_limit_stops_reading_and_progress_is_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", *PAIRS[:2], {"broken": True})
    report = import_records(str(source), tmp_path / "r.jsonl", limit=1)
    assert (report.rows, report.records, report.chosen_discarded) == (1, 1, 0)
    with pytest.raises(UsageError, match="must be 1 or more"):
        import_records(str(source), tmp_path / "r.jsonl", limit=0)
    write_rows(source, *[{"prompt": "p", "rejected": "a"}] * 2500)
    told: list[int] = []
    assert import_records(str(source), tmp_path / "r.jsonl", progress=told.append).rejections == 2500
    assert told == [1000, 2000]


# --- personal data


def test_what_is_personal() -> None:
    for text, expected in (
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to [email]."),
        ("Call +49 170 1234567 or (555) 123-4567, +15551234567.", "Call [phone] or [phone], [phone]."),
        ("my phone number is 5551234567!", "my phone number is [phone]!"),
        ("key sk-proj-abcDEF1234567890abcd and ghp_0123456789abcdefABCDEF", "key [key] and [key]"),
        ("AKIAABCDEFGHIJKLMNOP hf_abcdefghijklmnopqrst", "[key] [key]"),
        ("password: hunter22x, api_key='0123456789ab'", "password: [key], api_key='[key]'"),
        ("Authorization: Bearer abcdefghij0123456789", "Authorization: Bearer [key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----!", "[key]!"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", "[key]"),
    ):
        assert redact_text(text, Counter())[0] == expected
    for text in (
        "2024-05-17 10:30:59 INFO, 17.05.2024 10:30",
        "On 2024-05-17 at 10:30 it was 3.14159, 1 000 000 of 192.168.100.200.",
        "1 2 3 4 5 6 7 8 9 10 11 12, chapters 12-14",
        "a@b, @handle, the token is short, my password is secret",
        "Numbers 1700000000 and 12345678901234567890",
    ):
        assert redact_text(text, Counter())[0] == text


def test_spans_move_with_the_text() -> None:
    text = "Hi a@b.example, write c@d.example now."
    counts: Counter[str] = Counter()
    record = make_record("To a@b.example", [text, "fine"], [2, 1], 3, [[[3, 5], [16, 21], [34, 37]], []])
    redacted = redact_record(record, counts)
    assert redacted.prompt == "To [email]"
    assert redacted.rejected_responses == ("Hi [email], write [email] now.", "fine")
    parts = [redacted.rejected_responses[0][slice(*span)] for span in redacted.rejected_spans[0]]
    assert parts == ["[email]", "write", "now"]
    assert (redacted.rejection_counts, redacted.rounds, counts) == ((2, 1), (3, 3), Counter(email=3))
    plain = make_record([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], ["a"])
    assert redact_record(plain, counts) is plain


PERSONAL = st.lists(st.sampled_from(["a@b.example", "+49 170 1234567", " ", "word", ". ", "é", "sk-0123456789abcdefg"]))


@given(PERSONAL, st.data())
def test_redacted_spans_lie_within_and_cover_the_same_text(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    redacted, ((new_start, new_end),) = redact_text(text, Counter(), ((start, end),))
    assert 0 <= new_start <= new_end <= len(redacted)
    assert redacted[:new_start] == redact_text(text, Counter())[0][:new_start]
    if "[" not in redacted:
        assert redacted[new_start:new_end] == text[start:end]
    assert (end > start) <= (new_end > new_start)


def test_the_command_redacts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("q,a\nMail jane@x.example,No: +49 170 1234567\n")
    words = ["data", "import", str(tmp_path / "t.csv"), "-o", str(tmp_path / "r.jsonl"), "--redact", "--json"]
    assert main([*words, "--column", "prompt=q", "--column", "answer=a"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["redacted"] == {"key": 0, "email": 1, "phone": 1}
    assert "redacted: 0 key, 1 email, 1 phone" in err
    assert "jane" not in (tmp_path / "r.jsonl").read_text() + err
    assert main([*words, "--column", "prompt"]) == 2
    assert "such as prompt=question" in capsys.readouterr().err
    assert main([*words, "--format", "columns"]) == 2
    assert "--column prompt=NAME" in capsys.readouterr().err


def test_a_file_that_is_there_stays_until_it_may_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "pairs.jsonl", tmp_path / "r.jsonl"
    source.write_text('{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}\n')
    output.write_text("notes of mine\n")
    words = ["data", "import", str(source), "-o", str(output)]
    assert main(words) == 2
    assert "r.jsonl is there already" in capsys.readouterr().err
    assert output.read_text() == "notes of mine\n"
    assert main([*words, "--overwrite"]) == 0
    assert "notes" not in output.read_text()


def test_of_several_chosen_answers_each_is_counted(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]})
    assert import_records(str(source), tmp_path / "r.jsonl").chosen_discarded == 2
    report = import_records(str(source), tmp_path / "r.jsonl", keep_accepted=True)
    assert (report.chosen_discarded, report.accepted) == (0, 2)
