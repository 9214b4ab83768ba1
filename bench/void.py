"""The Void as its page asks it. Prints what it measured; `void_page.py` drives the page itself.

    python bench/void.py again      from a thumbs-down to a better answer, twice: what takes how long
    python bench/void.py answers    how soon the page is answered, with 10,000 rejections and 1,000 conversations

Both start a server of their own with the bundled model.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from buleyean_rl.data.records import make_record  # noqa: E402
from buleyean_rl.models.source import BUNDLED  # noqa: E402
from buleyean_rl.void.store import ImportedFile, Store, TurnSettings  # noqa: E402
from buleyean_rl.void.store.rejections import record_rows  # noqa: E402
from voids import Process, running  # noqa: E402

PROMPT = "Give me two tips for sleeping better."
REJECTIONS, CONVERSATIONS, TURNS, ASKED = 10_000, 1_000, 3, 30
STEPS = 12  # the page's for one rejection


def again() -> None:
    """The loop over HTTP, with a warm model."""
    with tempfile.TemporaryDirectory() as name, running(BUNDLED, Path(name) / "void") as void:
        for turn, prompt in enumerate((PROMPT, "Give me two tips for learning a language.")):
            answer = void.ask(f"asked-{turn:03}", prompt)["answers"][0]
            started = time.monotonic()
            void.reject(f"reject-{turn:03}", answer).raise_for_status()
            planned = void.get("state")["plan"]["seconds"]
            run = void.post("runs", uid=f"run-{turn:05}", steps=STEPS).raise_for_status().json()["id"]
            parts = [("the first step", lambda row: row["points"]), ("the last step", trained)]
            for what, is_reached in [*parts, ("the new model swapped in", lambda row: row["state"] != "running")]:
                while not is_reached(row := void.get(f"runs/{run}")):
                    time.sleep(0.05)
                print(f"{time.monotonic() - started:7.1f} s  {what}")
            assert row["state"] == "done", row["error"]
            void.ask(f"again-{turn:03}", prompt)
            print(f"{time.monotonic() - started:7.1f} s  asked again, both answered; {planned} s were said\n")


def trained(run: dict[str, Any]) -> bool:
    return len(run["points"]) == STEPS or run["state"] != "running"


def answers() -> None:
    """Times of the page's requests, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "void"
        fill(folder)
        with running(BUNDLED, folder) as void:
            measure(void)


def fill(folder: Path) -> None:
    """A store with many rejections and conversations."""
    draw = random.Random(0)
    folder.mkdir()
    with closing(Store(folder / "void.db")) as store:
        store.database._writer.execute("PRAGMA synchronous = OFF")  # it is no store of anybody's
        records = [
            make_record(f"prompt {n % 5000}", [f"answer {n} " + "words " * draw.randrange(50, 150)])
            for n in range(REJECTIONS)
        ]
        rows = (row for record in records for row in record_rows(record))
        store.imports.add(ImportedFile("upload-01", "0", "log.jsonl"), "records", REJECTIONS, rows)
        for number in range(CONVERSATIONS):
            for turn in range(TURNS):
                uid, prompt = f"turn-{number}-{turn}", f"question {turn} of {number}"
                store.conversations.ask(uid, f"talk-{number:04}", prompt, TurnSettings(), [("base", "m")] * 2)
                asked = store.conversations.turn(uid)
                assert asked is not None
                for answer in asked["answers"]:
                    store.conversations.save(answer, "1. **Some** words.\n" * draw.randrange(5, 50), "done")


def measure(void: Process) -> None:
    card = void.ask("question-0", "Say hello.")["answers"][0]
    requests: dict[str, Callable[[int], Any]] = {
        "the page itself": lambda _: void.client.get("/"),
        "state": lambda _: void.get("state"),
        "the newest conversations": lambda _: void.get("conversations"),
        "conversations by words": lambda n: void.get(f"conversations?q=of {n}"),
        "a conversation": lambda n: void.get(f"conversations/talk-{n:04}"),
        "the newest rejections": lambda _: void.get("rejections?page=0"),
        "the oldest rejections": lambda _: void.get("rejections?page=199"),
        "rejections by words": lambda n: void.get(f"rejections?q=answer {n}"),
        "one more rejection": lambda n: void.reject(f"reject-{n:03}", card, spans=[[0, n + 1]]).raise_for_status(),
        "its reason": lambda n: ok(void, f"rejections/{REJECTIONS + n + 1}/reason", reason="It is wrong."),
        "undo": lambda n: ok(void, f"rejections/{REJECTIONS + n + 1}/undo"),
        "the models": lambda _: void.get("models"),
    }
    quiet = {what: [timed(request, n) for n in range(ASKED)] for what, request in requests.items()}
    asking = [timed(lambda n: ok(void, "turns", **question(n)), n) for n in range(8)]
    busy = {what: [timed(request, n) for n in range(ASKED)] for what, request in requests.items()}
    assert void.get("turns/asked-007")["answers"][0]["state"] in ("waiting", "writing"), "it fell silent meanwhile"
    print("milliseconds, median and most    at rest          while it answers")
    for what in requests:
        print(f"{what:24}{in_milliseconds(quiet[what])}{in_milliseconds(busy[what])}")
    print(f"{'a new question':24}{'':18}{in_milliseconds(asking)}")
    print(f"{'export of all':24} {1000 * timed(lambda _: void.client.get('/api/export'), 0):7.1f}")
    lines = "\n".join(json.dumps({"prompt": f"p {n % 5000}", "rejected": f"a {n}"}) for n in range(REJECTIONS))
    took = timed(lambda _: void.upload("upload-02", lines).raise_for_status(), 0)
    print(f"{'import of as many':24} {1000 * took:7.1f}")


def question(number: int) -> dict[str, Any]:
    uid = f"asked-{number:03}"
    return {"uid": uid, "conversation": uid, "prompt": PROMPT}


def in_milliseconds(took: list[float]) -> str:
    return f"{1000 * statistics.median(took):9.1f}{1000 * max(took):9.1f}"


def ok(void: Process, path: str, **body: Any) -> None:
    void.post(path, **body).raise_for_status()


def timed(request: Callable[[int], Any], number: int) -> float:
    started = time.perf_counter()
    request(number)
    return time.perf_counter() - started


if __name__ == "__main__":
    {"again": again, "answers": answers}[sys.argv[1]]()
