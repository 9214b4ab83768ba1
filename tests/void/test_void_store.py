"""The store: what is acknowledged stays, nothing is doubled, older files are brought up."""

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

from buleyean_rl.data.records import make_record
from buleyean_rl.errors import UsageError
from buleyean_rl.void.store import ImportedFile, Store
from buleyean_rl.void.store.imports import CHUNK
from buleyean_rl.void.store.rejections import record_rows
from buleyean_rl.void.store.schema import MIGRATIONS
from void_rows import add_import, reject


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "void.db")
    yield opened
    opened.close()


def test_an_import_is_stored_whole_or_not_at_all(store: Store) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from record_rows(make_record("p", ["a", "b"]))
        raise OSError("the file cannot be read on")

    with pytest.raises(OSError, match="cannot be read on"):
        store.imports.add(ImportedFile("upload-1", "0", "log"), "records", 1, rows())
    assert store.rejections.count() == 0
    assert store.imports.list() == store.database.all("SELECT id FROM rejections") == []
    assert add_import(store, "upload-1", [make_record("p", ["a"])]) == 1


def test_others_write_while_a_large_import_is_stored_and_a_kill_leaves_nothing_of_it(tmp_path: Path) -> None:
    def rows(last: Any) -> Iterator[dict[str, Any]]:
        for number in range(CHUNK + 1):
            if number == CHUNK:
                last()
            yield from record_rows(make_record("p", [f"answer {number}"]))

    class Killed(BaseException):
        pass

    def write() -> None:
        reject(store, "uid-1")
        assert (store.rejections.count(), store.imports.list()) == (1, [])

    store = Store(tmp_path / "void.db")
    store.imports.add(ImportedFile("upload-1", "0", "log"), "records", 1, rows(write))
    assert store.rejections.count() == CHUNK + 2

    def kill() -> None:
        store.close()  # nothing can be written any more
        raise Killed

    with pytest.raises((Killed, sqlite3.ProgrammingError)):
        store.imports.add(ImportedFile("upload-2", "0", "log"), "records", 1, rows(kill))
    store = Store(tmp_path / "void.db")
    assert (store.rejections.count(), len(store.imports.list())) == (CHUNK + 2, 1)
    assert store.database.count("rejections") == CHUNK + 2
    store.close()


def test_an_import_is_undone_and_redone_as_one(store: Store) -> None:
    reject(store, "uid-1")
    add_import(store, "upload-1", [make_record("q", ["x", "y", "z"])])
    everything = store.rejections.records()
    (imported,) = store.imports.list()
    assert (imported["rejections"], imported["format"], imported["undone"]) == (3, "records", None)
    store.imports.undo(imported["id"])
    store.imports.undo(imported["id"])  # again changes nothing
    assert [record.prompt for record in store.rejections.records()] == ["p"]
    store.imports.undo(imported["id"], undone=False)
    store.imports.undo(imported["id"], undone=False)
    assert store.rejections.records() == everything
    store.rejections.undo([2])  # one of the three, which stays undone
    store.imports.undo(imported["id"])
    store.imports.undo(imported["id"], undone=False)
    assert store.rejections.count() == 3
    assert store.imports.get(99) is None


def test_a_file_is_known_by_its_bytes_until_its_import_is_undone(store: Store) -> None:
    add_import(store, "upload-1", [make_record("q", ["x"])], sha256="abc")
    earlier = store.imports.find_file("abc")
    assert earlier is not None
    assert store.imports.find_file("abd") is None
    store.imports.undo(earlier["id"])
    assert store.imports.find_file("abc") is None


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
            db.execute(
                f"INSERT INTO answers VALUES (1, 'nobody', {', '.join('0' * 12)})"
            )  # to a turn that there is not

    with pytest.raises(sqlite3.IntegrityError):
        fail()
    reject(store, "uid-1")
    assert store.rejections.count() == 1


def test_reading_waits_for_no_writer(store: Store) -> None:
    with store.database.writing() as db:
        db.execute("INSERT INTO conversations VALUES ('talk', 'title', 0, 0, NULL)")
        assert store.conversations.get("talk") is None
        assert store.rejections.count() == 0
    assert store.conversations.get("talk") is not None


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


def test_a_file_of_the_last_version_is_brought_up_with_all_that_is_in_it(tmp_path: Path) -> None:
    path, version = tmp_path / "void.db", 5
    with sqlite3.connect(path) as old:
        for script in MIGRATIONS[:version]:
            old.executescript(script)
        old.execute(f"PRAGMA user_version = {version}")
        old.executescript("""
            INSERT INTO questions VALUES ('asked-01', 'Wie geht''s, é?', 0, 1, 5.0), ('asked-02', 'blind', 1, 0, 6.0);
            INSERT INTO answers VALUES ('asked-01', 0, 'base', 'm', 'gut'), ('asked-01', 1, 'trained', 'run 1', 'so'),
                ('asked-02', 0, 'base', 'm', NULL);
            INSERT INTO rejections (uid, digest, prompt, answer, spans, count, rounds, reason, source, created,
                question, slot) VALUES ('n-1', 'd', '"Wie geht''s, \\u00e9?"', 'gut', '[[0, 1]]', 1, 1, 'why', 'page',
                7.0, 'asked-01', 0);
            INSERT INTO runs (uid, folder, state, records, steps, error, created)
                VALUES ('run-uid', 'runs/run-1', 'done', 3, 12, '', 8.0);
            INSERT INTO samples VALUES (1, 0, 'p', 'b', 'a');
        """)
    old.close()
    for _ in range(2):
        store = Store(path)
        conversations = store.conversations.page()["conversations"]
        assert [(row["title"], row["rejected"]) for row in conversations] == [
            ("blind", False),
            ("Wie geht's, é?", True),
        ]
        turn = store.conversations.get("asked-01")["turns"][0]  # type: ignore[index]
        assert [(a["model"], a["name"], a["text"], a["state"]) for a in turn["answers"]] == [
            ("base", "m", "gut", "done"), ("run-1", "run 1", "so", "done"),
        ]  # fmt: skip
        assert turn["answers"][0]["rejections"] == [{"id": 1, "spans": [[0, 1]], "reason": "why"}]
        assert [(row["turn"], row["max_tokens"]) for row in store.conversations.unfinished()] == [("asked-02", 128)]
        run = store.runs.get(1)
        assert run is not None
        assert (run["name"], run["decision"], run["samples"][0]["unlearned"]) == ("run 1", "kept", None)
        assert len(store.rejections.records()) == 1
        store.close()


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
            reject(store, f"uid-{writer}-{number}", f"answer {writer} {number}")

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert store.rejections.count() == 160


WRITER = """
import sys
from pathlib import Path
from buleyean_rl.void.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    uid = f"{sys.argv[2]}-{number}"
    answer = {"context": f'"prompt {uid}"', "text": "an answer " * 50, "drawn": None}
    store.rejections.add(uid, answer)
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
