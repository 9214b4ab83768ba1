"""The store: what is acknowledged stays, nothing is doubled, and ten thousand rejections are no burden."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.records import RejectionRecord, make_record
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.void.store import ImportedFile, Store
from buleyean_rl.void.store.rejections import MAX_SHOWN, record_rows
from buleyean_rl.void.store.schema import MIGRATIONS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "void.db")
    yield opened
    opened.close()


def add_import(store: Store, uid: str, records: list[RejectionRecord], sha256: str = "0") -> int:
    """Import records; returns how many rejections there are more."""
    before = store.rejections.count()
    rows = (row for record in records for row in record_rows(record))
    store.imports.add(ImportedFile(uid, sha256, "log.jsonl"), "records", len(records), rows)
    return store.rejections.count() - before


def reject(store: Store, uid: str, answer: str = "a", **changes: object) -> int:
    values: dict[str, Any] = {"uid": uid, "prompt": "p", "answer": answer, "spans": (), "reason": "", "source": "page"}
    return int(store.rejections.add(**values | changes)["id"])


def test_a_rejection_is_counted_said_why_undone_and_redone(store: Store) -> None:
    first = reject(store, "uid-1")
    second = reject(store, "uid-2", reason="why")
    reject(store, "uid-3", spans=((0, 1),))
    page = store.rejections.page()
    assert [(row["times"], row["spans"], row["reason"]) for row in page["rows"]] == [(1, [[0, 1]], ""), (2, [], "why")]
    assert (page["total"], store.rejections.count()) == (2, 3)
    assert store.rejections.records() == [make_record("p", ["a", "a"], [2, 1], None, [[], [[0, 1]]], rounds=[2, 1])]
    assert store.rejections.set_reason(first, "because")
    assert store.rejections.undo(second)
    assert store.rejections.page()["rows"][1]["reason"] == "because"
    assert store.rejections.count() == 2
    assert store.rejections.undo(second, undone=False)
    assert store.rejections.count() == 3
    assert not store.rejections.undo(99)
    assert not store.rejections.set_reason(99, "")


def test_the_same_uid_is_the_same_rejection(store: Store) -> None:
    assert reject(store, "uid-1") == reject(store, "uid-1") == 1
    assert store.rejections.count() == 1
    store.rejections.undo(1)
    reject(store, "uid-1")
    assert store.rejections.count() == 0


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


def test_an_import_is_stored_whole_or_not_at_all(store: Store) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from record_rows(make_record("p", ["a", "b"]))
        raise OSError("the file cannot be read on")

    with pytest.raises(OSError, match="cannot be read on"):
        store.imports.add(ImportedFile("upload-1", "0", "log"), "records", 1, rows())
    assert store.rejections.count() == 0
    assert store.imports.list() == []
    assert add_import(store, "upload-1", [make_record("p", ["a"])]) == 1


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
    store.rejections.undo(1)
    assert store.rejections.records() == [make_record("p", ["y"], [0], 3)]  # which anchors
    assert store.rejections.count() == 0


def test_an_import_is_undone_and_redone_as_one(store: Store) -> None:
    reject(store, "uid-1")
    add_import(store, "upload-1", [make_record("q", ["x", "y", "z"])])
    everything = store.rejections.records()
    (imported,) = store.imports.list()
    assert (imported["rejections"], imported["format"], imported["undone"]) == (3, "records", None)
    assert store.imports.undo(imported["id"])
    assert store.imports.undo(imported["id"])  # again changes nothing
    assert [record.prompt for record in store.rejections.records()] == ["p"]
    assert store.imports.undo(imported["id"], undone=False)
    assert store.imports.undo(imported["id"], undone=False)
    assert store.rejections.records() == everything
    store.rejections.undo(2)  # one of the three, which stays undone
    store.imports.undo(imported["id"])
    store.imports.undo(imported["id"], undone=False)
    assert store.rejections.count() == 3
    assert not store.imports.undo(99)


def test_a_file_is_known_by_its_bytes_until_its_import_is_undone(store: Store) -> None:
    add_import(store, "upload-1", [make_record("q", ["x"])], sha256="abc")
    earlier = store.imports.find_file("abc")
    assert earlier is not None
    assert store.imports.find_file("abd") is None
    store.imports.undo(earlier["id"])
    assert store.imports.find_file("abc") is None


def test_a_reason_outlives_an_undo_and_a_later_rejection_without_one(store: Store) -> None:
    key = {"answer_key": ("q-1", 0)}
    first = reject(store, "uid-1", reason="why", **key)
    store.rejections.undo(first)
    again = store.rejections.add("uid-2", "p", "a", (), "", "page", ("q-1", 0))
    assert again["reason"] == "why"
    part = store.rejections.add("uid-3", "p", "a", ((0, 1),), "", "page", ("q-1", 0))
    assert part["reason"] == ""  # another rejection than the one that was undone
    reject(store, "uid-4")
    rows = store.rejections.page()["rows"]
    assert [(row["times"], row["reason"]) for row in rows] == [(2, "why"), (1, "")]
    assert store.rejections.undo(first, undone=False)
    assert store.rejections.page()["rows"][0]["times"] == 3


def test_a_book_is_shown_in_part_and_exported_whole(store: Store) -> None:
    record = make_record("p" * 50_000, ["a" * 50_000])
    add_import(store, "upload-1", [record])
    (row,) = store.rejections.page()["rows"]
    assert (len(row["prompt"]), len(row["answer"])) == (MAX_SHOWN + 1, MAX_SHOWN)
    assert store.rejections.records() == [record]


def test_a_full_disk_loses_nothing_and_is_survived(store: Store) -> None:
    reject(store, "uid-1")
    (pages,) = store.database.all("PRAGMA page_count")
    with store.database._write_lock:  # as if the file could not grow
        store.database._writer.execute(f"PRAGMA max_page_count = {pages['page_count']}")
    for number in range(3):
        with pytest.raises(OSError, match="No space left"):
            reject(store, f"full-{number}", "long " * 10_000)
    assert store.rejections.count() == 1
    with store.database._write_lock:
        store.database._writer.execute("PRAGMA max_page_count = 1000000")
    reject(store, "full-0", "long " * 10_000)
    assert store.rejections.count() == 2


def test_a_commit_that_fails_leaves_no_transaction_behind(store: Store) -> None:
    """The disk may be found full only when a transaction ends."""

    def fail() -> None:
        with store.database.writing() as db:
            db.execute("PRAGMA defer_foreign_keys = ON")
            db.execute("INSERT INTO answers VALUES ('nobody', 0, '', '', NULL)")  # to a question that there is not

    with pytest.raises(sqlite3.IntegrityError):
        fail()
    reject(store, "uid-1")
    assert store.rejections.count() == 1


def test_reading_waits_for_no_writer(store: Store) -> None:
    with store.database.writing() as db:
        db.execute("INSERT INTO questions VALUES ('q', 'p', 0, 1, 0)")
        assert store.questions.get("q") is None
        assert store.rejections.count() == 0
    assert store.questions.get("q") is not None


def test_questions_keep_their_answers(store: Store) -> None:
    for _ in range(2):
        store.questions.add("q-1", "hi", True, [("trained", "run 1"), ("base", "m")])
    store.questions.finish_answer("q-1", 1, "hello")
    question = store.questions.get("q-1")
    assert question is not None
    assert [(a["side"], a["text"]) for a in question["answers"]] == [("trained", None), ("base", "hello")]
    assert not question["revealed"]
    kept = store.rejections.add("n-1", "hi", "hello", ((0, 1),), "why", "page", ("q-1", 1))["id"]
    store.rejections.undo(store.rejections.add("n-2", "hi", "hello", (), "", "page", ("q-1", 1))["id"])
    answers = store.questions.get("q-1")["answers"]  # type: ignore[index]
    assert [a["rejections"] for a in answers] == [[], [{"id": kept, "spans": [[0, 1]], "reason": "why"}]]
    store.questions.reveal("q-1")
    assert store.questions.get("q-1")["revealed"]  # type: ignore[index]
    assert store.questions.get("nobody") is None


def test_runs_and_their_steps_are_not_doubled(store: Store) -> None:
    run = store.runs.add("run-uid", "folder", 3, 12)
    assert store.runs.add("run-uid", "folder", 3, 12) == run
    for loss in (1.0, 0.5):
        store.runs.add_point(run, {"step": 1, "loss": loss, "floor": 0.1, "gap": loss - 0.1})
    store.runs.add_samples(run, [("p", "b", "a")])
    store.runs.end(run, "failed", "why")
    found = store.runs.get(run)
    assert found is not None
    assert [point["loss"] for point in found["points"]] == [0.5]
    assert (found["state"], found["error"], found["samples"][0]["after"]) == ("failed", "why", "a")
    assert [(row["id"], row["step"]) for row in store.runs.list()] == [(run, 1)]
    assert store.runs.get(99) is None


def test_an_older_file_is_brought_up_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "void.db"
    with sqlite3.connect(path) as old:
        old.executescript(MIGRATIONS[0])
        old.execute("PRAGMA user_version = 1")
        row = "(NULL, ?, 'd', '\"p\"', ?, '[]', 60, 60, 'why', ?, 1.0, NULL)"
        for number, (answer, origin) in enumerate((("a", "page"), ("b", "import"))):
            old.execute(f"INSERT INTO rejections VALUES {row}", (str(number), answer, origin))
    old.close()
    store = Store(path)
    # a person's no was 60 of 60; what was imported stays what it says
    assert store.rejections.records() == [make_record("p", ["a", "b"], [1, 60], rounds=[1, 60])]
    assert store.runs.list() == []
    store.close()
    again = Store(path)
    assert again.rejections.count() == 2
    again.close()


def test_files_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at as one. " * 20)
    with pytest.raises(UsageError, match="is no store"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "later") as later:
        later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(UsageError, match="later version"):
        Store(tmp_path / "later")
    with sqlite3.connect(tmp_path / "foreign") as foreign:
        foreign.execute("CREATE TABLE songs (title TEXT)")
    foreign.close()
    before = (tmp_path / "foreign").read_bytes()
    with pytest.raises(UsageError, match="another program's"):
        Store(tmp_path / "foreign")
    assert (tmp_path / "foreign").read_bytes() == before
    with pytest.raises(UsageError, match="cannot be opened"):
        Store(tmp_path / "missing" / "void.db")


def test_many_threads_write_and_nothing_is_lost(store: Store) -> None:
    def write(writer: int) -> None:
        for number in range(20):
            reject(store, f"uid-{writer}-{number}", f"answer {number}")

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert store.rejections.count() == 160
    assert {row["times"] for row in store.rejections.page()["rows"]} == {8}


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


WRITER = """
import sys
from pathlib import Path
from buleyean_rl.void.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    uid = f"{sys.argv[2]}-{number}"
    store.rejections.add(uid, f"prompt {uid}", "an answer " * 50, (), "", "page")
    print(uid, flush=True)  # acknowledged
    number += 1
"""


@pytest.mark.slow
def test_killed_a_hundred_times_while_writing_it_keeps_all_that_was_acknowledged(tmp_path: Path) -> None:
    path, acknowledged, waits = tmp_path / "void.db", set(), random.Random(1)
    for life in range(100):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), f"life-{life}"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        threading.Timer(waits.uniform(0.0, 0.04), writer.send_signal, [signal.SIGKILL]).start()
        lines = writer.stdout.read().split("\n")
        acknowledged |= {line for line in lines[:-1] if line}
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
    store = Store(path)
    kept = {str(record.prompt).removeprefix("prompt ") for record in store.rejections.records()}
    assert len(acknowledged) > 100
    assert acknowledged <= kept
    assert len(kept) <= len(acknowledged) + 100  # at most the one write that each kill cut off from its answer
    assert store.rejections.count() == len(kept)
    store.close()
