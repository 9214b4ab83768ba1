"""Sources: JSON of every layout, tables, folders and the Hub; a bad row is refused with its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.importers import Choices, import_records
from buleyean_rl.data.importers.expand import is_hub_id
from buleyean_rl.data.records import make_record, read_records
from buleyean_rl.errors import RecordError, UsageError
from drawn import write_rows

ROWS = [{"prompt": "p", "chosen": "Yes.", "rejected": "No."}, {"prompt": "q", "chosen": "Yes.", "rejected": "No."}]


def refused(problem: str, source: Path | str, output: Path | str, **options: Any) -> RecordError:
    with pytest.raises(RecordError, match=problem) as caught:
        import_records(str(source), output, **options)
    return caught.value


# --- JSON


def test_json_files_of_every_layout(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", "\ufeff \n" + json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"version": [1], "n": {"a": []}, "data": ROWS}, indent=1)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert import_records(str(tmp_path / name), tmp_path / "r").rows == 2
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "p", "rejected": ["No."]}, indent=2))  # one row
    assert import_records(str(tmp_path / "a.json"), tmp_path / "r").records == 1


@pytest.mark.parametrize(
    ("name", "content", "place", "problem"),
    [
        ("a.jsonl", b'{"prompt": "p", "chosen": "", "rejected": "a"}\n\n{"prompt"\n', ":3: ", "not valid JSON"),
        ("a.jsonl", b'{"prompt": "p", "chosen": "", "rejected": "a"}\n{"prompt": "p"}\n', ":2: ", "no rejected"),
        ("a.json", b'[\n{"prompt": "p", "label": false,\n"completion": "a"},\n{"label": 3}]', ":4: ", "label is"),
        ("a.json", b'[\n{"prompt": "p", "rejected": "a"}\n{"prompt"', ":3: ", "breaks off"),
        ("a.json", b'[\n{"prompt": "p", "rejected": "a"},\n', ":3: ", "not valid JSON"),
        ("a.json", b'[\n{"prompt": "p", "rejected": "a"},\n7]', ":3: ", "is the number 7"),
        ("a.json", b'[\n{"prompt": "p", "prompt": "a"}]', ":2: ", "stands twice"),
        ("a.json", b'[\n{"prompt": "\xe9"}]', ":2: ", "is not UTF-8"),
        ("a.json", b'{"x": ', ":1: ", "not valid JSON"),
        ("a.json", b'{"x": [], "y": {}}', ": ", "no known format: its first row has the keys x, y"),
        ("a.json", b'{"x": [{}], "y": [{}]}', ": ", "holds 2 lists of objects"),
        ("a.json", b"[]", ": ", "empty list"),
        ("a.json", b"\0\1", ": ", "is a binary file"),
        ("a.jsonl", b'{"text": "a"}', ": ", "no known format"),
        ("a.jsonl", b'{"prompt": "p", "completion": "a", "label": true}', ": ", "no rejected answer in 1 row read"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, place: str, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(problem, tmp_path / name, tmp_path / "r.jsonl")
    assert str(error).startswith(f"{tmp_path / name}{place}")
    assert os.listdir(tmp_path) == [name]


def test_values_one_after_another_are_all_read(tmp_path: Path) -> None:
    rows = [{"prompt": str(k), "chosen": "Yes.", "rejected": "No."} for k in range(6)]
    texts = [
        json.dumps(rows[0]),
        json.dumps(rows[1], indent=1),
        json.dumps(rows[2]) + json.dumps(rows[3]),
        json.dumps({"data": rows[4:5], "meta": {}}),
        json.dumps(rows[5:], indent=2),
    ]
    for name in ("a.json", "a.jsonl"):
        for content in ("\n".join(texts), "\n".join(texts[::-1])):
            (tmp_path / name).write_text(content)
            assert import_records(str(tmp_path / name), tmp_path / "r").rows == 6
    (tmp_path / "a.jsonl").write_text("\n".join([texts[0], '{"prompt": "x",', *texts[1:]]))
    refused("a.jsonl:3: is not valid JSON", tmp_path / "a.jsonl", tmp_path / "r")
    report = import_records(str(tmp_path / "a.jsonl"), tmp_path / "r", skip_bad=True)
    assert (report.records, report.skipped) == (6, 1)


def test_packed_files_and_other_encodings(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "Grüße", "chosen": "a", "rejected": "Nö."}, ensure_ascii=False)
    for name, content, options in (
        ("a.jsonl.gz", gzip.compress(text.encode()), {}),
        ("b.jsonl", text.encode("utf-16"), {}),
        ("c.jsonl", text.encode("cp1252"), {"encoding": "cp1252"}),
        ("d.csv", 'prompt;chosen;rejected\r\nGrüße;a;"Nö."\r\n'.encode("utf-16"), {}),
    ):
        (tmp_path / name).write_bytes(content)
        import_records(str(tmp_path / name), tmp_path / "r", **options)
        assert list(read_records(tmp_path / "r")) == [make_record("Grüße", ["Nö."])], name
    refused("--encoding cp1252", tmp_path / "c.jsonl", tmp_path / "s")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode() * 50)[:-9])
    refused("damaged .gz", tmp_path / "e.jsonl.gz", tmp_path / "s")
    with pytest.raises(UsageError, match="no encoding 'klingon'"):
        import_records(str(tmp_path / "b.jsonl"), tmp_path / "s", encoding="klingon")


def test_parquet_arrow_and_saved_data_sets(tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(
        [{"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "No."}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    saved = datasets.Dataset(table)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(left=saved, right=saved).save_to_disk(tmp_path / "three")
    for name in ("a.parquet", "one", "two", "one/data-00000-of-00001.arrow"):
        import_records(str(tmp_path / name), tmp_path / "r")
        assert list(read_records(tmp_path / "r")) == [make_record("p", ["No."])], name
    refused("has the splits left, right: choose one with --split", tmp_path / "three", tmp_path / "s")
    assert import_records(str(tmp_path / "three"), tmp_path / "r", split="left").rows == 1
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    refused("no Parquet or Arrow file", tmp_path / "a.parquet", tmp_path / "s")


# --- tables


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nprompt;answer;rating\nHi;Go.;BAD\nHi;Hm.;--\n",
        '"Prompt","answer"\n'.lower() + "Hi,Go.\n",
        '"prompt\n(one line)",answer,score\nHi,Go.,0\n\n,,\n',
        "prompt|response|rating\r\nHi|Go.|0\r\n",
        'id,input,output,thumb,timestamp\n1,"""Hi""","{""content"": ""Go."", ""role"": ""assistant""}",[0],t\n',
        "prompt,rejected_responses\nHi,\"['Go.']\"\n",
    ],
)
def test_tables_as_tools_write_them(tmp_path: Path, text: str) -> None:
    columns = {"prompt": text.splitlines()[0][1:7], "answer": "answer"} if "rat" not in text and "Hi,Go" in text else {}
    if "(one line)" in text:
        columns["prompt"] = "prompt (one line)"
    report, records = import_table(tmp_path, text, columns)
    assert records == [make_record("Hi", ["Go."])]
    assert report.unrated == text.count("--")


CSV = 'question,reply,stars\n"What, now?","It is\n""late"".",1\nHi,Hello,5\nHi,Go.,2\n'
COLUMNS = {"prompt": "question", "answer": "reply", "score": "stars"}


def import_table(folder: Path, text: str, columns: dict[str, str], name: str = "t.csv", **options: Any) -> Any:
    (folder / name).write_text(text, encoding=options.pop("encoding", "utf-8"))
    report = import_records(str(folder / name), folder / "r.jsonl", choices=Choices(columns, below=3), **options)
    return report, list(read_records(folder / "r.jsonl"))


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_table_with_named_columns(tmp_path: Path, name: str, delimiter: str) -> None:
    text = CSV if delimiter == "," else CSV.replace('"What, now?"', '"What; now?"').replace(",", delimiter)
    report, records = import_table(tmp_path, "\ufeff" + text, COLUMNS, name)
    assert [record.rejected_responses for record in records] == [('It is\n"late".',), ("Go.",)]
    assert (report.format, report.rows, report.chosen_discarded) == ("columns", 3, 1)


@pytest.mark.parametrize("format", ["auto", "kto"])
@pytest.mark.parametrize(
    "header", ['"Prompt\n(one line)",Answer,Rating', "QUESTION, Response ,Score (0 or 1)", "Prompt,completion,LABEL *"]
)
def test_names_of_columns_as_people_write_them(tmp_path: Path, header: str, format: str) -> None:
    _, records = import_table(tmp_path, f"{header}\nName a bird.,Cat.,0\nName a fish.,Cod.,5\n", {}, format=format)
    assert records == [make_record("Name a bird.", ["Cat."])]


def test_names_that_would_be_the_same_stay(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="its first row has the keys Prompt, PROMPT, Answer, Rating"):
        import_table(tmp_path, "Prompt,PROMPT,Answer,Rating\na,b,c,0\n", {})


def test_without_a_score_every_row_is_a_rejection_and_a_system_prompt_may_be_a_column(tmp_path: Path) -> None:
    _, records = import_table(tmp_path, CSV, {"prompt": "question", "answer": "reply", "system": "stars"})
    assert len(records) == 3
    assert records[0].prompt == (("system", "1"), ("user", "What, now?"))


def test_a_bad_table_is_refused_and_bad_rows_of_it_can_be_skipped(tmp_path: Path) -> None:
    for text, columns, problem in (
        (CSV, COLUMNS | {"answer": "a"}, r"t.csv:2: has no column 'a' \(its columns: question, reply, stars\)"),
        (CSV + "Hi,Go\n", COLUMNS, "t.csv:6: has . cells, and the first row 3"),
        (CSV + "Hi,Go,1,2\n", COLUMNS, "t.csv:6: has . cells, and the first row 3"),
        (CSV.replace("5", "so so"), COLUMNS, "t.csv:4: column 'stars' is 'so so'"),
        ("a,a\n1,2\n", COLUMNS, "two columns of one name"),
        ('question,reply,stars\n"open,1,2\n', COLUMNS, "is not a table"),
        ("question,reply,stars\n", COLUMNS, "has no rejected answer"),
    ):
        with pytest.raises(RecordError, match=problem):
            import_table(tmp_path, text, columns)
    with pytest.raises(RecordError, match="is not UTF-8"):
        import_table(tmp_path, CSV.replace("late", "spät"), COLUMNS, encoding="latin-1")
    report, records = import_table(tmp_path, CSV + "Hi,Go\n", COLUMNS, skip_bad=True)
    assert (report.skipped, len(records)) == (1, 2)


# --- folders


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
    answers = {record.prompt: record.rejected_responses for record in read_records(tmp_path / "r.jsonl")}
    assert answers == {"Say hi.": ("Go.", "No."), "Say bye.": ("Never.",), "Say more.": ("Less.",)}
    (folder / "prompt.txt").unlink()
    refused(r"one.txt: has no prompt: write what was asked into one.prompt.txt", folder, tmp_path / "r.jsonl")
    (tmp_path / "empty").mkdir()
    refused(r"holds no .txt or .md file", tmp_path / "empty", tmp_path / "r.jsonl")


# --- the Hub


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("trl-lib/ultrafeedback_binarized")
    assert is_hub_id("owner/name.v2")
    for path in ("owner/data.jsonl", "./owner/name", "/owner/name", "name", "a/b/c"):
        assert not is_hub_id(path)
    (tmp_path / "owner").mkdir()  # so that owner/name is a path
    refused("no such file", "owner/name", "r.jsonl")


class LocalHub:
    """The Hub, in memory: splits of rows, streamed."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.options: dict[str, Any] = {}

    def get_dataset_split_names(self, _name: str) -> list[str]:
        return list(self.splits)

    def load_dataset(self, _name: str, **options: Any) -> Any:
        self.options = options
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
    assert local.options == {"split": "train_prefs", "streaming": True}, "no code of the data set is ever run"
    assert import_records("owner/name", "r.jsonl", split="test_prefs").rows == 1


def test_a_data_set_that_fails_is_named_with_the_row(hub: Any) -> None:
    for splits, split, problem in (
        ({"train": [*ROWS, {"chosen": "a", "rejected": "b"}]}, None, "owner/name:3: has no prompt"),
        ({"train": ROWS}, "test", r"owner/name: cannot be loaded from the Hub \(Bad split: test\)"),
        ({"a": ROWS, "b": ROWS}, None, "owner/name: has the splits a, b: choose one with --split"),
        ({"train": []}, None, "owner/name: .*it has no good row"),
    ):
        hub(**splits)
        refused(problem, "owner/name", "r.jsonl", split=split)


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
    load_dataset = datasets.load_dataset

    def load_local(_name: str, *, split: str, streaming: bool) -> Any:
        return load_dataset("json", data_files={"train": str(source)}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.chdir(tmp_path)
    report = import_records("openbmb/UltraFeedback", "r.jsonl", split="train")
    assert list(read_records("r.jsonl")) == [make_record("Hi", ["b", "c", "d"], [2, 2, 1], 3)]
    assert (report.rows, report.ties, report.without_rejection) == (2, 1, 1)
