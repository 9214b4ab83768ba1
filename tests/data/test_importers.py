"""Importers: each shape of row, what is discarded, where errors point, files and data sets."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buleyean_rl.data.importers import FORMATS, Discards, detect_format, find_format, import_records, is_hub_id
from buleyean_rl.data.records import RejectionRecord, fold_records, make_record, read_records
from buleyean_rl.errors import RecordError, UsageError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def convert(row: dict[str, Any], name: str | None = None) -> tuple[list[RejectionRecord], Discards]:
    discards = Discards()
    known = find_format(name) if name else detect_format([row])
    return list(known.convert(row, discards)), discards


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- the shapes


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"instruction": "Hi", "input": "", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]},
        {  # a binarised UltraFeedback: `messages` is the chosen conversation and must not be taken for the prompt
            "prompt": "Hi",
            "messages": [user("Hi"), assistant("Yes.")],
            "chosen": [user("Hi"), assistant("Yes.")],
            "rejected": [user("Hi"), assistant("No.")],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
    ],
)
def test_a_pair_keeps_the_rejected_answer_only(row: dict[str, Any]) -> None:
    assert detect_format([row]).name == "pairs"
    assert convert(row) == ([make_record("Hi", ["No."])], Discards(chosen_discarded=1))


def test_a_pair_of_conversations_shares_its_prompt() -> None:
    turns = [user("Hi"), assistant("Hello."), user("And?")]
    row = {"chosen": [*turns, assistant("Yes.")], "rejected": [*turns, assistant("No.")]}
    assert convert(row)[0] == [make_record(turns, ["No."])]


def test_a_transcript_is_a_conversation() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\nYou?\n\nHuman: And?\n\nAssistant:"
    row = {"chosen": f"{start} Yes.", "rejected": f"{start} No."}
    turns = [user("Hi"), assistant("Hello.\nYou?"), user("And?")]
    assert convert(row) == ([make_record(turns, ["No."])], Discards(chosen_discarded=1))
    # beside a prompt, or after other text, it is an answer like any other
    assert convert(row | {"prompt": "Hi"})[0] == [make_record("Hi", [row["rejected"]])]
    with pytest.raises(RecordError, match="has no prompt"):
        convert({"chosen": f"Well. {start}", "rejected": f"Well. {start}"})


def test_the_alpaca_input_joins_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Hi", "chosen": "Salut", "rejected": "No."}
    assert convert(row)[0][0].prompt == "Translate.\nHi"


def test_a_pair_may_reject_what_it_chooses() -> None:
    assert convert({"prompt": "Hi", "chosen": "No.", "rejected": "No."})[1].same_as_chosen == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [user("A"), assistant("Yes.")], "rejected": [user("B"), assistant("No.")]}, "part ways"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": [assistant("A"), user("b"), assistant("C")]}, "more than one"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": [user("A")]}, "ends with a user message"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": None}, "has no rejected answer"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": 3}, "rejected_responses is the number 3"),
        ({"chosen": "Yes.", "rejected": "No."}, "has no prompt"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi"}, "ends with a user message"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": "\n"}, "only whitespace"),
    ],
)
def test_a_bad_pair_says_what_is_wrong(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        convert(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Hi"), assistant("No.")]},
        {"prompt": "Hi", "completion": "No."},
        {"prompt": [user("Hi")], "completion": [assistant("No.")]},
    ],
)
def test_a_label_says_whether_it_is_a_rejection(row: dict[str, Any]) -> None:
    assert convert({**row, "label": False}) == ([make_record("Hi", ["No."])], Discards())
    assert convert({**row, "label": True}) == ([], Discards(chosen_discarded=1, without_rejection=1))
    with pytest.raises(RecordError, match="label is the number 0: it must be true"):
        convert({**row, "label": 0})


def test_a_labelled_conversation_rejects_its_last_answer() -> None:
    turns = [user("Hi"), assistant("Hello."), user("And?")]
    row = {"messages": [*turns, assistant("No.")], "label": False}
    assert convert(row)[0] == [make_record(turns, ["No."])]
    with pytest.raises(RecordError, match="an answer without a prompt"):
        convert({"messages": [assistant("No.")], "label": False})
    with pytest.raises(RecordError, match="2 messages: one answer is wanted"):
        convert({"prompt": "Hi", "completion": [user("a"), assistant("b")], "label": False})


def test_scores_are_rounds_of_every_pair() -> None:
    row = {
        "instruction": "Hi",
        "completions": [
            {"response": "best", "overall_score": 9.0},
            {"response": "tied", "overall_score": 5.0},
            {"response": "Tied", "overall_score": 5.0},
            {"response": "worst", "overall_score": 1},
        ],
    }
    records, discards = convert(row)
    assert records == [make_record("Hi", ["tied", "Tied", "worst"], [1, 1, 3], 3)]
    assert discards == Discards(chosen_discarded=1, ties=1)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_rounds_are_won_lost_or_tied(scores: list[int]) -> None:
    row = {"prompt": "Hi", "responses": [f"answer {k}" for k in range(len(scores))], "scores": scores}
    records, discards = convert(row)
    lost = sum(sum(record.rejection_counts) for record in records)
    assert lost + discards.ties == len(scores) * (len(scores) - 1) // 2
    assert all(record.total_rounds == len(scores) - 1 for record in records)
    assert f"answer {scores.index(max(scores))}" not in [r for rec in records for r in rec.rejected_responses]


def test_scores_of_ultrafeedbacks_aspects() -> None:
    def rated(*ratings: str) -> dict[str, Any]:
        names = ("helpfulness", "honesty", "truthfulness")
        return {name: {"Rating": rating} for name, rating in zip(names, ratings, strict=False)}

    row = {
        "instruction": "Hi",
        "completions": [
            {"response": "good", "annotations": rated("5", "N/A"), "overall_score": None},
            {"response": "poor", "annotations": rated("1", "2", "3")},
        ],
    }
    assert convert(row)[0] == [make_record("Hi", ["poor"])]


def test_rows_that_reject_nothing() -> None:
    assert convert({"prompt": "Hi", "completions": []}) == ([], Discards(without_rejection=1))
    one = [{"response": "a", "score": 1}]
    assert convert({"prompt": "Hi", "completions": one})[1] == Discards(chosen_discarded=1, without_rejection=1)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"completions": [{"response": "a", "score": "high"}]}, "score of candidate 0 is text"),
        ({"completions": [{"response": "a", "score": True}]}, "score of candidate 0 is true"),
        ({"completions": [{"response": "a", "score": 1}, {"response": "b"}]}, "candidate 1 has no score"),
        ({"completions": ["a"]}, "candidate 0 is text"),
        ({"completions": [{"score": 1}, {"score": 2}]}, "candidate 0 has no response"),
        ({"responses": ["a", "b"], "scores": [1]}, "1 scores for 2 answers"),
        ({"candidates": [{"response": "a", "rejection_count": -1}]}, "rejection_count of candidate 0"),
        ({"candidates": [{"response": "a", "rejection_count": 1.5}]}, "the number 1.5"),
        ({"candidates": [{"response": "a", "rejection_count": 4}], "total_rounds": 3}, "count is 4"),
    ],
)
def test_a_bad_score_or_count_says_so(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        convert({"prompt": "Hi", **row})


def test_candidates_carry_counts_or_scores() -> None:
    counted = {
        "prompt": [user("Hi")],
        # An answer nobody rejected is not looked at.
        "candidates": [{"response": "No.", "rejection_count": 2}, {"response": True, "rejection_count": 0}],
        "total_rounds": 3,
    }
    assert convert(counted) == ([make_record("Hi", ["No."], [2], 3)], Discards(chosen_discarded=1))
    scored = {
        "prompt": "Hi",
        "candidates": [
            {"model": "a", "response": [assistant("No.")], "score": 1.5},
            {"model": "b", "response": "Yes.", "score": 2},
        ],
    }
    assert convert(scored)[0] == [make_record("Hi", ["No."])]
    assert convert(scored, "scored")[0] == convert(scored)[0]


def open_webui(rating: object) -> dict[str, Any]:
    """A row of Open WebUI's feedback export: the conversation is a tree, and one message was rated."""
    thinking = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\n'
    messages = {
        "1": {"id": "1", "parentId": None, "childrenIds": ["2"], **user("Hi")},
        "2": {"id": "2", "parentId": "1", "childrenIds": ["3"], **assistant("Hello.")},
        "3": {"id": "3", "parentId": "2", "childrenIds": ["4", "5"], **user("And?")},
        "4": {"id": "4", "parentId": "3", "childrenIds": [], **assistant(thinking + "No.")},
        "5": {"id": "5", "parentId": "3", "childrenIds": [], **assistant("Yes.")},
    }
    chat = {"history": {"messages": messages, "currentId": "5"}, "params": {}, "messages": []}
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": None, "reason": "", "comment": ""},
        "meta": {"arena": False, "chat_id": "c", "message_id": "4", "message_index": 4},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": chat}},
    }


OPEN_WEBUI_PROMPT = [user("Hi"), assistant("Hello."), user("And?")]


@pytest.mark.parametrize("rating", [-1, "-1"])
def test_open_webui_thumbs_down(rating: object) -> None:
    row = open_webui(rating)
    assert convert(row) == ([make_record(OPEN_WEBUI_PROMPT, ["No."])], Discards())
    row["snapshot"]["chat"]["chat"]["params"]["system"] = "Be kind."
    assert convert(row)[0][0].prompt[0] == ("system", "Be kind.")
    for _ in range(2):  # older exports wrap the conversation less deeply
        row["snapshot"] = {"chat": {}} | row["snapshot"]["chat"]
        assert len(convert(row)[0]) == 1


def test_open_webui_thumbs_up_and_lost_snapshots() -> None:
    assert convert(open_webui(1)) == ([], Discards(chosen_discarded=1, without_rejection=1))
    row = open_webui(-1)
    row["snapshot"] = None
    with pytest.raises(RecordError, match="without its conversation"):
        convert(row)


def test_open_webui_chats() -> None:
    chat = open_webui(-1)["snapshot"]["chat"]["chat"]
    chat["history"]["messages"]["4"]["annotation"] = {"rating": -1}
    chat["history"]["messages"]["5"]["annotation"] = {"rating": 1}
    records, discards = convert({"id": "c", "title": "t", "chat": chat})
    assert records == [make_record(OPEN_WEBUI_PROMPT, ["No."])]
    assert discards == Discards(chosen_discarded=1)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["role", "content", "response", "score", "rejection_count", "rating", "chat", "history"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    st.sampled_from(
        ["prompt", "messages", "chosen", "rejected", "label", "completion", "completions", "candidates", "data", "chat"]
    ),
    st.sampled_from([known.name for known in FORMATS if known.name != "columns"]),
)
@example([{}, None], "chosen", "pairs")
@example({"rating": -1}, "data", "openwebui")
@example({"history": {"messages": []}}, "chat", "openwebui")
def test_no_row_makes_an_importer_crash(value: object, key: str, name: str) -> None:
    rows = [{"prompt": "Hi", "rejected": "No.", "label": False, "completion": "No.", key: value}, {key: value}]
    for row in rows:
        with suppress(RecordError):
            convert(row, name)


DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.skipif(not DATA_PAGE.exists(), reason="the readers' pages are not here")
def test_every_example_of_the_data_page_imports() -> None:
    page = DATA_PAGE.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.findall(r"^\{.*\}$", page, re.MULTILINE)]
    assert [detect_format([row]).name for row in rows] == [
        *["records"] * 2,
        *["pairs"] * 2,
        *["kto"] * 2,
        "candidates",
        "scored",
        *["traces"] * 2,
    ]
    records = [convert(row)[0] for row in rows]
    assert all(records)
    assert records[1][0].rejected_responses[0][slice(*records[1][0].rejected_spans[0][0])] == "twice twice"
    assert records[-3] == [make_record("Hi", ["Hm.", "Go."], [1, 2], 2)]
    assert records[-1] == records[-2] == [make_record("Hi", ["Go."])]


# --- choosing the format


def test_auto_looks_at_the_first_row_that_it_knows() -> None:
    rows = [{"text": "x"}, {"prompt": "Hi", "rejected": ["No."]}]
    assert detect_format(rows).name == "records"
    with pytest.raises(RecordError, match=r"keys text, date(.|\n)*pairs: prompt, chosen, rejected"):
        detect_format([{"text": "x", "date": 1}])


def test_an_unknown_format_is_a_wrong_use() -> None:
    with pytest.raises(UsageError, match="choose auto, records, pairs"):
        import_records("x.jsonl", "y.jsonl", format="zip")


# --- files


def test_importing_folds_discards_and_reports(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "pairs.jsonl",
        {"prompt": "p", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "q", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "p", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "p", "chosen": "Yes.", "rejected": "Go."},
    )
    report = import_records(source, tmp_path / "r.jsonl")
    assert list(read_records(tmp_path / "r.jsonl")) == [
        make_record("p", ["No.", "Go."], [2, 1], 3),
        make_record("q", ["No."]),
    ]
    assert (report.rows, report.records, report.rejections, report.answers) == (4, 2, 4, 3)
    assert (report.chosen_discarded, report.duplicates_folded, report.prompts_repeated) == (4, 1, 2)
    assert any("discarded: 4" in line for line in report.lines())
    assert json.loads(json.dumps(report.as_dict()))["format"] == "pairs"


def test_importing_records_again_changes_nothing(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "p", "rejected_responses": ["No.", "No."], "rejection_counts": [1, 2], "total_rounds": 9},
        {"messages": [user("a"), assistant("b"), user("c")], "rejected": ["abc"], "rejected_spans": [[[1, 2]]]},
    )
    assert import_records(source, tmp_path / "b.jsonl").duplicates_folded == 1
    import_records(str(tmp_path / "b.jsonl"), tmp_path / "b.jsonl")  # onto itself, too
    assert list(read_records(tmp_path / "b.jsonl")) == fold_records(read_records(source))


ROWS = [{"prompt": "p", "chosen": "Yes.", "rejected": "No."}, {"prompt": "q", "chosen": "Yes.", "rejected": "No."}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"version": [1], "n": {"a": []}, "data": ROWS}, indent=1)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_json_files_of_every_layout(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert import_records(str(tmp_path / name), tmp_path / "r").rows == 2


def test_a_json_file_may_be_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "p", "rejected": ["No."]}, indent=2))
    assert import_records(str(tmp_path / "a.json"), tmp_path / "r").records == 1


@pytest.mark.parametrize(
    ("name", "content", "place", "problem"),
    [
        ("a.jsonl", '{"prompt": "p", "chosen": "", "rejected": "a"}\n\n{"prompt"\n', ":3: ", "not valid JSON"),
        ("a.jsonl", '{"prompt": "p", "chosen": "", "rejected": "a"}\n{"prompt": "p"}\n', ":2: ", "no rejected"),
        ("a.json", '[\n{"prompt": "p", "label": false,\n"completion": "a"},\n{"label": 1}]', ":4: ", "label is"),
        ("a.json", '[\n{"prompt": "p", "rejected": "a"}\n{"prompt"', ":3: ", "breaks off"),
        ("a.json", '[\n{"prompt": "p", "rejected": "a"},\n', ":3: ", "not valid JSON"),
        ("a.json", '[\n{"prompt": "p", "rejected": "a"},\n7]', ":3: ", "is the number 7"),
        ("a.json", '[\n{"prompt": "p", "prompt": "a"}]', ":2: ", "stands twice"),
        ("a.json", '[{"prompt": "p", "rejected": "a", "x": NaN}]', ":1: ", "NaN"),
        ("a.json", '{"x": ', ":1: ", "not valid JSON"),
        ("a.json", '{"x": [], "y": {}}', ": ", "holds 0 lists of objects"),
        ("a.json", '{"x": [{}], "y": [{}]}', ": ", "holds 2 lists of objects"),
        ("a.json", "[]", ": ", "empty list"),
        ("a.json", "", ": ", "is empty"),
        ("a.json", "\0\1", ": ", "is a binary file"),
        ("a.jsonl", '{"text": "a"}', ": ", "no known format"),
        ("a.jsonl", '{"prompt": "p", "completion": "a", "label": true}', ": ", "no rejected answer in 1 rows"),
    ],
)
def test_a_bad_file_names_the_place(tmp_path: Path, name: str, content: str, place: str, problem: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(RecordError, match=problem) as caught:
        import_records(str(tmp_path / name), tmp_path / "r.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / name}{place}")
    assert os.listdir(tmp_path) == [name]


def test_a_json_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n{"prompt": "\xe9"}]')
    with pytest.raises(RecordError, match=r"a\.json:2: is not UTF-8"):
        import_records(str(tmp_path / "a.json"), tmp_path / "r.jsonl")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ['{"prompt"', json.dumps(ROWS[0]), '{"prompt": "p", "chosen": "a"}', json.dumps(ROWS[1]), "7"]
    path.write_text("\n".join(rows), encoding="utf-8")
    report = import_records(str(path), tmp_path / "r.jsonl", skip_bad=True)
    assert (report.rows, report.records, report.skipped) == (5, 2, 3)
    assert [error.split(":")[1] for error in report.errors] == ["1", "5", "3"]  # `auto` reads ahead


def test_the_limit_stops_reading(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", *ROWS, {"broken": True})
    report = import_records(source, tmp_path / "r.jsonl", limit=1)
    assert (report.rows, report.records, report.chosen_discarded) == (1, 1, 0)
    with pytest.raises(UsageError, match="must be 1 or more"):
        import_records(source, tmp_path / "r.jsonl", limit=0)


def test_progress_is_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", *[{"prompt": "p", "rejected": "a"}] * 2500)
    told: list[int] = []
    assert import_records(source, tmp_path / "r.jsonl", progress=told.append).rejections == 2500
    assert told == [1000, 2000]


# --- the Hub


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("trl-lib/ultrafeedback_binarized", True),
        ("owner/name.v2", True),
        ("owner/data.jsonl", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("name", False),
        ("a/b/c", False),
    ],
)
def test_what_is_a_hub_id(source: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(source) is is_id


def test_a_folder_of_the_owners_name_means_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(RecordError, match="no such file"):
        import_records("owner/name", "r.jsonl")


class LocalHub:
    """The Hub, in memory: splits of rows, streamed."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.asked: dict[str, Any] = {}

    def get_dataset_split_names(self, _name: str) -> list[str]:
        return list(self.splits)

    def load_dataset(self, _name: str, **options: Any) -> Any:
        self.asked = options
        if options["split"] not in self.splits:
            raise ValueError(f"Bad split: {options['split']}\nmore")
        return iter(self.splits[options["split"]])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    import datasets

    def install(**splits: list[dict[str, Any]]) -> LocalHub:
        local = LocalHub(splits)
        monkeypatch.setattr(datasets, "load_dataset", local.load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_split_names", local.get_dataset_split_names)
        return local

    monkeypatch.chdir(tmp_path)
    return install


def test_a_data_set_streams_from_the_hub(hub: Any) -> None:
    local = hub(train_sft=[], train_prefs=ROWS, test_prefs=ROWS[:1])
    report = import_records("owner/name", "r.jsonl")
    assert (report.format, report.rows, report.records) == ("pairs", 2, 2)
    assert local.asked == {"split": "train_prefs", "streaming": True}, "no code of the data set is ever run"
    assert import_records("owner/name", "r.jsonl", split="test_prefs").rows == 1


@pytest.mark.parametrize(
    ("splits", "split", "problem"),
    [
        ({"train": [*ROWS, {"chosen": "a", "rejected": "b"}]}, None, "owner/name:3: has no prompt"),
        ({"train": ROWS}, "test", r"owner/name: cannot be loaded from the Hub \(Bad split: test\)"),
        ({"a": ROWS, "b": ROWS}, None, "owner/name: has the splits a, b: choose one with --split"),
        ({"train": []}, None, "owner/name: .*it has no good row"),
    ],
)
def test_a_data_set_that_fails_says_so(hub: Any, splits: Any, split: str | None, problem: str) -> None:
    hub(**splits)
    with pytest.raises(RecordError, match=problem):
        import_records("owner/name", "r.jsonl", split=split)


def test_the_real_loader_streams_a_local_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows as `datasets` yields them: the original UltraFeedback, with nulls and its nested aspects."""
    import datasets

    rating = {"Rating": "4", "Rationale": "ok", "Type": None}
    completions = [
        {"response": text, "overall_score": score, "model": "m", "annotations": {"honesty": rating}}
        for text, score in (("a", 8.5), ("b", 3.0), ("c", 3.0), ("d", 7.0))
    ]
    source = write_rows(
        tmp_path / "uf.jsonl",
        {"source": "s", "instruction": "Hi", "completions": completions, "correct_answers": ["None"]},
        {"source": "s", "instruction": "Ho", "completions": [], "correct_answers": None},
    )
    real = datasets.load_dataset

    def local(_name: str, *, split: str, streaming: bool) -> Any:
        return real("json", data_files={"train": source}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.chdir(tmp_path)
    report = import_records("openbmb/UltraFeedback", "r.jsonl", split="train")
    assert list(read_records("r.jsonl")) == [make_record("Hi", ["b", "c", "d"], [2, 2, 1], 3)]
    assert (report.rows, report.ties, report.without_rejection) == (2, 1, 1)
