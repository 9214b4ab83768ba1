"""The Void as a person has it. Prints what it measured.

    python bench/void.py loop       ask, reject a part, train, hear the difference: in a browser, at a person's pace
    python bench/void.py again      from a thumbs-down to a better answer, twice, without a browser: what takes how long
    python bench/void.py answers    how soon the page is answered with ten thousand rejections in the store

All start a server of their own with the bundled model and an empty store. `BULEYEAN_SCREENSHOTS=FOLDER` keeps what
the browser showed.
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

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from browsers import Browser, browsing  # noqa: E402
from buleyean_rl.data.records import make_record  # noqa: E402
from buleyean_rl.evaluation.repetition import repeated_spans  # noqa: E402
from buleyean_rl.models.source import BUNDLED  # noqa: E402
from buleyean_rl.void.store import ImportedFile, Store, TurnSettings  # noqa: E402
from buleyean_rl.void.store.rejections import record_rows  # noqa: E402
from voids import Process, running  # noqa: E402

PROMPT = "Give me two tips for sleeping better."
TYPING, READING, MOVING = 0.15, 0.3, 1.5  # seconds a key, a word, and to find the next thing with the hand
REJECTIONS, CONVERSATIONS, TURNS, ASKED = 10_000, 1_000, 3, 30
STEPS = 12  # the page's for one rejection


def loop() -> None:
    """The loop from an empty store to the trained model's answer."""
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        with running(BUNDLED, folder / "void") as void, browsing(folder, "window-size=1100,800") as browser:
            told = [("the server is up", time.monotonic() - started)]

            def tell(what: str) -> None:
                told.append((what, time.monotonic() - started - sum(seconds for _, seconds in told)))

            browser.patience = browser.driver.command_executor.client_config.timeout = 1800  # slow is a finding too
            person = Person(browser)
            browser.open(void)
            browser.until(lambda: "nothing trained yet" in browser.find("#models").text)
            (before,) = person.ask(PROMPT)
            tell("asked, answered and read")
            start = person.reject_repeats(before)
            person.write(".said input", "It says the same again and again.")
            browser.look("rejected")
            tell("a part rejected, with a reason")
            person.click("#train-button")
            browser.until(lambda: browser.all("#live-chart polyline"))
            browser.look("training")
            browser.until(lambda: "is done" in browser.find("#train-state").text)
            tell(f"trained for {browser.find('#steps').get_attribute('value')} steps, and the new model swapped in")
            answers = person.ask(PROMPT)
            tell("asked again, both answered and read")
            whole = sum(seconds for _, seconds in told)
            pictures(void, browser, answers[0])
    for what, seconds in told:
        print(f"{seconds:7.1f} s  {what}")
    print(f"{whole:7.1f} s  in all\n\n{before[:start]}[{before[start:]}]\n\nnow: {answers[1]}")


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


class Person:
    """Somebody who types, reads and uses a mouse, in the time that takes."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def ask(self, prompt: str) -> list[str]:
        """Type a question, wait for the answers, read them."""
        self.browser.find("#prompt").clear()
        self.write("#prompt", prompt)
        self.browser.until(lambda: self.browser.find("#asked").text == prompt)
        answers = self.browser.texts()
        time.sleep(READING * sum(len(answer.split()) for answer in answers))
        return answers

    def write(self, css: str, text: str) -> None:
        """Into a field, key by key, and Enter."""
        time.sleep(MOVING)
        field = self.browser.find(css)
        for key in (*text, Keys.ENTER):
            field.send_keys(key)
            time.sleep(TYPING)

    def click(self, css: str) -> None:
        time.sleep(MOVING)
        self.browser.find(css).click()

    def reject_repeats(self, answer: str) -> int:
        """Draw the mouse over the repeats of an answer, from the first to the end, and say no; where they start."""
        spans = repeated_spans(answer)
        assert spans, f"nothing in it repeats: {answer}"
        corners = """
            const node = document.querySelector('#answers .text'), range = document.createRange();
            node.scrollIntoView({block: 'center'});
            return [arguments[0], node.textContent.length - 1].map((at) => {
                range.setStart(node.firstChild, at); range.setEnd(node.firstChild, at + 1);
                const box = range.getBoundingClientRect();
                return [box.left, box.right, box.top + box.height / 2].map(Math.round);
            });"""
        units = len(answer[: spans[0][0]].encode("utf-16-le")) // 2
        (left, _, top), (_, right, bottom) = self.browser.run(corners, units)
        time.sleep(MOVING)
        hand = ActionChains(self.browser.driver).w3c_actions
        hand.pointer_action.move_to_location(left + 1, top).pointer_down().pause(MOVING)
        hand.pointer_action.move_to_location(right, bottom).pointer_up()
        hand.perform()
        self.browser.until(lambda: self.browser.find("[data-part]").is_displayed(), 30)
        self.click("[data-part]")
        self.browser.until(lambda: self.browser.contents("#answers mark"))
        return spans[0][0]


def pictures(void: Process, browser: Browser, base_answer: str) -> None:
    """What the documentation shows: both answers with a part rejected, and the run's page in the dark."""
    Person(browser).reject_repeats(base_answer)
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    time.sleep(5)  # what was said in passing is gone
    browser.look("talk")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)  # type: ignore[attr-defined]
    browser.open(void, "#runs/1")
    browser.until(lambda: browser.all("#card td"))
    time.sleep(0.5)
    browser.look("run")


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
    {"loop": loop, "again": again, "answers": answers}[sys.argv[1]]()
