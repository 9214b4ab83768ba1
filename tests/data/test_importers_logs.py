"""Logs people have: traces with scores, tables, folders; and personal data taken out of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.cli import main
from buleyean_rl.data.importers import Choices, import_records
from buleyean_rl.data.importers.redact import redact_record, redact_text
from buleyean_rl.data.records import make_record, read_records
from buleyean_rl.errors import RecordError, UsageError

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


def imported(tmp_path: Path, rows: list[Any], **options: Any) -> list[Any]:
    source = tmp_path / "log.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    import_records(str(source), tmp_path / "r.jsonl", **options)
    return list(read_records(tmp_path / "r.jsonl"))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"input": "q", "output": "a", "scores": [{"name": "user", "value": 0}]}, "q", "a"),
        ({"input": {"messages": MESSAGES}, "output": {"content": "a"}, "scores": [{"value": -1}]}, None, "a"),
        ({"input": MESSAGES, "output": [{"content": "a"}], "scores": [{"stringValue": "thumbs_down"}]}, None, "a"),
        ({"inputs": {"question": "q"}, "outputs": {"answer": "a"}, "feedback_stats": {"user": {"avg": 0.0}}}, "q", "a"),
        (
            {
                "inputs": {"messages": [[{"id": ["x"], "kwargs": {"type": "system", "content": "s"}},
                                         {"id": ["x"], "kwargs": {"type": "human", "content": "q"}}]]},
                "outputs": {"generations": [[{"text": "a", "message": {"kwargs": {"content": "a"}}}]]},
                "feedback": [{"key": "user_score", "score": False}],
            },
            None,
            "a",
        ),
        ({"input": [*MESSAGES, {"role": "assistant", "content": "a"}], "output": "a", "score": "bad"}, None, "a"),
        ({"inputs": {"anything": "q"}, "outputs": {"anything": "a"}, "score": 0.49}, "q", "a"),
    ],
)  # fmt: skip
def test_traces(tmp_path: Path, row: Any, prompt: str | None, answer: str) -> None:
    (record,) = imported(tmp_path, [row])
    assert record.prompt == (prompt or (("system", "s"), ("user", "q")))
    assert record.rejected_responses == (answer,)
    assert (record.rejection_counts, record.total_rounds) == ((1,), 1)


def test_a_traces_scores_are_rounds_and_good_ones_are_discarded(tmp_path: Path) -> None:
    trace = {"input": "q", "output": "a"}
    rows = [
        trace | {"scores": [{"name": "u", "value": v} for v in (0, 1, 0)]},
        trace | {"input": "other", "scores": [{"name": "u", "value": 1}]},
        trace | {"input": "unscored", "scores": []},
    ]
    (record,) = imported(tmp_path, rows)
    assert (record.rejection_counts, record.total_rounds) == ((2,), 3)
    two = [trace | {"scores": [{"name": "u", "value": 4}, {"name": "length", "value": 900}]}]
    with pytest.raises(RecordError, match=r"log.jsonl:1: has the scores length, u: choose one with --score"):
        imported(tmp_path, two)
    (record,) = imported(tmp_path, two, choices=Choices(score="u", below=5))
    assert record.rejection_counts == (1,)
    with pytest.raises(RecordError, match="has no rejected answer"):
        imported(tmp_path, two, choices=Choices(score="u", below=4))
    with pytest.raises(RecordError, match="the score u is 'meh'"):
        imported(tmp_path, [trace | {"scores": [{"name": "u", "value": "meh"}]}])


CSV = 'question,reply,stars\n"What, now?","It is\n""late"".",1\nHi,Hello,5\nHi,Go.,2\n'
COLUMNS = {"prompt": "question", "answer": "reply", "score": "stars"}


def table(tmp_path: Path, text: str, columns: dict[str, str], name: str = "t.csv", **options: Any) -> Any:
    (tmp_path / name).write_text(text, encoding=options.pop("encoding", "utf-8"))
    report = import_records(str(tmp_path / name), tmp_path / "r.jsonl", choices=Choices(columns, below=3), **options)
    return report, list(read_records(tmp_path / "r.jsonl"))


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_table_with_named_columns(tmp_path: Path, name: str, delimiter: str) -> None:
    text = CSV if delimiter == "," else CSV.replace('"What, now?"', '"What; now?"').replace(",", delimiter)
    report, records = table(tmp_path, "\ufeff" + text, COLUMNS, name)
    assert [record.rejected_responses for record in records] == [('It is\n"late".',), ("Go.",)]
    assert (report.format, report.rows, report.chosen_discarded) == ("columns", 3, 1)


def test_without_a_score_every_row_is_a_rejection_and_a_system_prompt_may_be_a_column(tmp_path: Path) -> None:
    _, records = table(tmp_path, CSV, {"prompt": "question", "answer": "reply", "system": "stars"})
    assert len(records) == 3
    assert records[0].prompt == (("system", "1"), ("user", "What, now?"))


@pytest.mark.parametrize(
    ("text", "columns", "problem"),
    [
        (
            CSV,
            COLUMNS | {"answer": "answer"},
            r"t.csv:2: has no column 'answer' \(its columns: question, reply, stars\)",
        ),
        (CSV + "Hi,Go\n", COLUMNS, "t.csv:6: has not 3 cells"),
        (CSV + "Hi,Go,1,2\n", COLUMNS, "t.csv:6: has not 3 cells"),
        (CSV.replace("5", "great"), COLUMNS, "t.csv:4: column 'stars' is 'great'"),
        ("a,a\n1,2\n", COLUMNS, "two columns of one name"),
        ('question,reply,stars\n"open,1,2\n', COLUMNS, "is not a table"),
        ("question,reply,stars\n", COLUMNS, "has no rejected answer"),
    ],
)
def test_a_bad_table(tmp_path: Path, text: str, columns: dict[str, str], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        table(tmp_path, text, columns)


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not UTF-8"):
        table(tmp_path, CSV.replace("late", "spät"), COLUMNS, encoding="latin-1")


def test_bad_rows_of_a_table_are_skipped(tmp_path: Path) -> None:
    report, records = table(tmp_path, CSV + "Hi,Go\n", COLUMNS, skip_bad=True)
    assert (report.skipped, len(records)) == (1, 2)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [({"prompt": "q"}, "no column for answer"), ({"prompt": "q", "answer": "a", "stars": "s"}, "no role stars")],
)
def test_columns_that_do_not_fit(columns: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Choices(columns)


def test_a_folder_of_bad_answers(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    (folder / "deep" / "er").mkdir(parents=True)
    for name, text in {
        "prompt.txt": "Say hi.\n",
        "one.txt": "Go.\n",
        "two.md": "\ufeffNo.",
        "three.txt": "Never.",
        "three.prompt.txt": "Say bye.",
        "deep/prompt.txt": "Say more.",
        "deep/er/four.txt": "Less.",
        "picture.png": "",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    import_records(str(folder), tmp_path / "r.jsonl")
    found = {record.prompt: record.rejected_responses for record in read_records(tmp_path / "r.jsonl")}
    assert found == {"Say hi.": ("Go.", "No."), "Say bye.": ("Never.",), "Say more.": ("Less.",)}
    (folder / "prompt.txt").unlink()
    with pytest.raises(RecordError, match=r"one.txt: has no prompt: write what was asked into one.prompt.txt"):
        import_records(str(folder), tmp_path / "r.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"holds no .txt or .md file"):
        import_records(str(tmp_path / "empty"), tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to [email]."),
        ("Call +49 170 1234567 or (555) 123-4567, +15551234567.", "Call [phone] or [phone], [phone]."),
        ("my phone number is 5551234567!", "my phone number is [phone]!"),
        ("key sk-proj-abcDEF1234567890abcd and ghp_0123456789abcdefABCDEF", "key [key] and [key]"),
        ("AKIAABCDEFGHIJKLMNOP hf_abcdefghijklmnopqrst", "[key] [key]"),
        ("password: hunter22x, api_key='0123456789ab'", "password: [key], api_key='[key]'"),
        ("Authorization: Bearer abcdefghij0123456789", "Authorization: Bearer [key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----!", "[key]!"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", "[key]"),
        # nothing personal
        ("On 2024-05-17 at 10:30 it was 3.14159, 1 000 000 of 192.168.100.200.", None),
        ("1 2 3 4 5 6 7 8 9 10 11 12, chapters 12-14", None),
        ("a@b, @handle, the token is short, my password is secret", None),
        ("Numbers 1700000000 and 12345678901234567890", None),
    ],
)  # fmt: skip
def test_what_is_personal(text: str, expected: str | None) -> None:
    assert redact_text(text, Counter())[0] == (text if expected is None else expected)


def test_spans_move_with_the_text() -> None:
    text = "Hi a@b.example, write c@d.example now."
    found: Counter[str] = Counter()
    record = make_record("To a@b.example", [text, "fine"], [2, 1], 3, [[[3, 5], [16, 21], [34, 37]], []])
    redacted = redact_record(record, found)
    assert redacted.prompt == "To [email]"
    assert redacted.rejected_responses == ("Hi [email], write [email] now.", "fine")
    parts = [redacted.rejected_responses[0][slice(*span)] for span in redacted.rejected_spans[0]]
    assert parts == ["[email]", "write", "now"]
    assert (redacted.rejection_counts, redacted.total_rounds, found) == ((2, 1), 3, Counter(email=3))
    plain = make_record([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], ["a"])
    assert redact_record(plain, found) is plain


PERSONAL = st.lists(st.sampled_from(["a@b.example", "+49 170 1234567", " ", "word", ". ", "é", "sk-0123456789abcdefg"]))


@given(PERSONAL, st.data())
def test_redacted_spans_lie_within_and_keep_what_they_held(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    redacted, ((new_start, new_end),) = redact_text(text, Counter(), ((start, end),))
    assert 0 <= new_start <= new_end <= len(redacted)
    assert redacted[:new_start] == redact_text(text, Counter())[0][:new_start]
    held = redact_text(text[start:end], Counter())[0]
    if "[" not in redacted:
        assert redacted[new_start:new_end] == held
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
