"""The store: what is acknowledged stays, nothing is doubled, and ten thousand rejections are no burden."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buleyean_rl.data.records import make_record
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.void.store import MIGRATIONS, ROUNDS, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "void.db")
    yield opened
    opened.close()


def reject(store: Store, uid: str, answer: str = "a", **changes: object) -> int:
    return store.reject(
        **{"uid": uid, "prompt": "p", "answer": answer, "spans": (), "reason": "", "source": "page"} | changes
    )  # type: ignore[arg-type]


def test_a_rejection_is_counted_said_why_undone_and_redone(store: Store) -> None:
    first = reject(store, "uid-1")
    second = reject(store, "uid-2", reason="why")
    reject(store, "uid-3", spans=((0, 1),))
    page = store.rejections()
    assert [(row["times"], row["spans"], row["reason"]) for row in page["rows"]] == [(1, [[0, 1]], ""), (2, [], "why")]
    assert (page["total"], store.count()) == (2, 3)
    assert store.records() == [make_record("p", ["a", "a"], [120, 60], spans=[[], [[0, 1]]], rounds=[120, 60])]
    assert store.set_reason(first, "because")
    assert store.undo(second)
    assert store.rejections()["rows"][1]["reason"] == "because"
    assert store.count() == 2
    assert store.undo(second, undone=False)
    assert store.count() == 3
    assert not store.undo(99)
    assert not store.set_reason(99, "")


def test_the_same_uid_is_the_same_rejection(store: Store) -> None:
    assert reject(store, "uid-1") == reject(store, "uid-1") == 1
    assert store.count() == 1
    store.undo(1)
    reject(store, "uid-1")
    assert store.count() == 0


@pytest.mark.parametrize("spans", [((0, 9),), ((1, 1),), ((True, 1),), ("ab",), (None,)])
def test_spans_beyond_the_answer_are_refused(store: Store, spans: tuple[object, ...]) -> None:
    with pytest.raises(RecordError):
        reject(store, "uid-1", spans=spans)
    assert store.count() == 0


def test_records_come_in_once_and_go_out_as_they_came(store: Store) -> None:
    records = [
        make_record("q", ["x", "y"], [45, 12], 60, [[[0, 1]], []]),
        make_record([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], ["é"], [1], 1),
    ]
    assert store.import_records("upload-1", records, "import") == 3
    assert store.import_records("upload-1", records, "import") == 0
    assert store.records() == records
    assert store.rejections()["rows"][0]["prompt"] == "system: s\nuser: u"


def test_a_persons_no_stands_beside_imported_counts(store: Store) -> None:
    store.import_records("upload-1", [make_record("p", ["x"], [1], 3)], "import")
    reject(store, "uid-1", "a")
    assert store.records() == [make_record("p", ["x", "a"], [1, ROUNDS], rounds=[3, ROUNDS])]


def test_an_upload_is_kept_whole_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    insert = store._insert
    calls = iter([True, True, False])

    def failing(*words: object) -> None:
        if not next(calls):
            raise OSError("disk full")
        insert(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_insert", failing)
    with pytest.raises(OSError, match="disk full"):
        store.import_records("upload-1", [make_record("p", list("abc"))], "import")
    assert store.count() == 0


def test_questions_keep_their_answers(store: Store) -> None:
    for _ in range(2):
        store.add_question("q-1", "hi", True, [("trained", "run 1"), ("base", "m")])
    store.finish_answer("q-1", 1, "hello")
    question = store.question("q-1")
    assert question is not None
    assert [(a["side"], a["text"]) for a in question["answers"]] == [("trained", None), ("base", "hello")]
    assert not question["revealed"]
    kept = store.reject("n-1", "hi", "hello", ((0, 1),), "why", "page", ("q-1", 1))
    store.undo(store.reject("n-2", "hi", "hello", (), "", "page", ("q-1", 1)))
    answers = store.question("q-1")["answers"]  # type: ignore[index]
    assert [a["rejections"] for a in answers] == [[], [{"id": kept, "spans": [[0, 1]], "reason": "why"}]]
    store.reveal("q-1")
    assert store.question("q-1")["revealed"]  # type: ignore[index]
    assert store.question("nobody") is None


def test_runs_and_their_steps_are_not_doubled(store: Store) -> None:
    run = store.add_run("run-uid", "folder", 3, 12)
    assert store.add_run("run-uid", "folder", 3, 12) == run
    for loss in (1.0, 0.5):
        store.add_point(run, {"step": 1, "loss": loss, "floor": 0.1, "gap": loss - 0.1})
    store.add_samples(run, [("p", "b", "a")])
    store.end_run(run, "failed", "why")
    found = store.run(run)
    assert found is not None
    assert [point["loss"] for point in found["points"]] == [0.5]
    assert (found["state"], found["error"], found["samples"][0]["after"]) == ("failed", "why", "a")
    assert [(row["id"], row["step"]) for row in store.runs()] == [(run, 1)]
    assert store.run(99) is None


def test_an_older_file_is_brought_up_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "void.db"
    with sqlite3.connect(path) as old:
        old.executescript(MIGRATIONS[0])
        old.execute("PRAGMA user_version = 1")
        old.execute("INSERT INTO rejections VALUES (1, 'u', 'd', '\"p\"', 'a', '[]', 60, 60, 'why', 'page', 1.0, NULL)")
    old.close()
    store = Store(path)
    assert store.records() == [make_record("p", ["a"], [60], 60)]
    assert store.runs() == []
    store.close()
    again = Store(path)
    assert again.count() == 1
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


def test_many_threads_write_and_nothing_is_lost(store: Store) -> None:
    def write(writer: int) -> None:
        for number in range(20):
            reject(store, f"uid-{writer}-{number}", f"answer {number}")

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert store.count() == 160
    assert {row["times"] for row in store.rejections()["rows"]} == {8}


def test_ten_thousand_rejections_with_answers_under_a_tenth_of_a_second(store: Store) -> None:
    texts = random.Random(0)
    records = [
        make_record(f"prompt {number}", [f"answer {number} " + "words " * texts.randrange(50, 200)])
        for number in range(10_000)
    ]
    store.import_records("upload-1", records, "import")
    pages = (lambda: store.rejections(0), lambda: store.rejections(199), store.count, lambda: reject(store, "uid-1"))
    for page in pages:
        took = []
        for _ in range(5):
            started = time.perf_counter()
            page()
            took.append(time.perf_counter() - started)
        assert min(took) < 0.1
    assert store.rejections(0)["total"] == 10_001
    assert len(store.rejections(199)["rows"]) == 50


WRITER = """
import sys
from pathlib import Path
from buleyean_rl.void.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    uid = f"{sys.argv[2]}-{number}"
    store.reject(uid, f"prompt {uid}", "an answer " * 50, (), "", "page")
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
    kept = {str(record.prompt).removeprefix("prompt ") for record in store.records()}
    assert len(acknowledged) > 100
    assert acknowledged <= kept
    assert len(kept) <= len(acknowledged) + 100  # at most the one write that each kill cut off from its answer
    assert store.count() == len(kept)
    store.close()
