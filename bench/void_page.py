"""The Void as a person has it: from an empty store to the trained model's answer, in a browser, at a person's pace.

    python bench/void_page.py                                      prints what took how long
    BULEYEAN_SCREENSHOTS=docs/images python bench/void_page.py     and draws the pictures of the documentation

The server is one of its own, with the bundled model and an empty store.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from browsers import Browser, browsing  # noqa: E402
from buleyean_rl.evaluation.repetition import repeated_spans  # noqa: E402
from buleyean_rl.models.source import BUNDLED  # noqa: E402
from voids import Process, running  # noqa: E402

PROMPT = "Give me two tips for sleeping better."
TYPING, READING, MOVING = 0.15, 0.3, 1.5  # seconds a key, a word, and to find the next thing with the hand


def loop() -> None:
    """Ask, reject the repeats, train, ask again, download."""
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        with running(BUNDLED, folder / "void") as void, browsing(folder, "window-size=1280,900") as browser:
            told = [("the server is up", time.monotonic() - started)]

            def tell(what: str) -> None:
                told.append((what, time.monotonic() - started - sum(seconds for _, seconds in told)))

            browser.patience = browser.driver.command_executor.client_config.timeout = 1800  # slow is a finding too
            browser.resize(1280, 900)
            browser.prefer("light")
            person = Person(browser)
            browser.open(void)
            browser.until(lambda: browser.all(".start"))
            person.ask(PROMPT)
            tell("asked, answered and read")
            start = person.reject_repeats(void)
            person.write(".state input", "It says the same again and again.")
            tell("a part rejected, with a reason")
            person.click("#train")
            browser.until(lambda: browser.all("#verdict:not([hidden]) [data-do=keep]"))
            tell("trained, measured, and the new model swapped in")
            browser.look("void-verdict")
            person.click("[data-do=keep]")
            answers = person.ask_again()
            tell("kept, asked again, both answered and read")
            download(void, browser, folder)
            tell("made as GGUF, and downloaded")
            whole = sum(seconds for _, seconds in told)
            pictures(void, browser)
    for what, seconds in told:
        print(f"{seconds:7.1f} s  {what}")
    print(f"{whole:7.1f} s  in all\n\nrejected from character {start} on\n\nnow: {answers[1]}")


def download(void: Process, browser: Browser, folder: Path) -> None:
    """The model's page, and its file."""
    button = "#files [data-kind=q8_0] button"
    browser.open(void, "#models/1")
    browser.until(lambda: browser.all(button))
    browser.click(button)
    browser.until(lambda: [path for path in folder.glob("*.gguf") if path.stat().st_size])


def pictures(void: Process, browser: Browser) -> None:
    """What the documentation shows: a rejected part beside the trained answer, and the model's page in the dark."""
    browser.open(void)
    browser.click("#conversations li a")
    browser.texts()
    browser.until(lambda: browser.all(".text del"))  # the same answer again, of which the part is still rejected
    browser.run("document.activeElement.blur()")
    time.sleep(6)  # what was said in passing is gone
    browser.look("void-talk")
    browser.prefer("dark")
    browser.open(void, "#models/1")
    browser.until(lambda: browser.all("#files li"))
    time.sleep(1)
    browser.look("void-model")


class Person:
    """Somebody who types, reads and uses a mouse, in the time that takes."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def ask(self, prompt: str) -> list[str]:
        """Type a question, wait for the answers, read them."""
        turns = len(self.browser.all(".turn"))
        self.write("#prompt", prompt)
        self.browser.until(lambda: len(self.browser.all(".turn")) > turns)
        return self.read()

    def read(self) -> list[str]:
        answers = self.browser.texts()
        time.sleep(READING * sum(len(answer.split()) for answer in answers))
        return answers

    def ask_again(self) -> list[str]:
        """Send the question that stands there already."""
        self.browser.until(lambda: self.browser.all(".start"))
        self.write("#prompt", "")
        self.browser.until(lambda: len(self.browser.all(".answer")) == 2)
        return self.read()

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

    def reject_repeats(self, void: Process) -> int:
        """Draw the mouse over the repeats of an answer, from the first to the end, and say no; where they start."""
        conversation = void.get("conversations")["conversations"][0]["id"]
        answer = void.get(f"conversations/{conversation}")["turns"][-1]["answers"][0]["text"]
        spans = repeated_spans(answer)
        assert spans, f"nothing in it repeats: {answer}"
        corners = """
            const answer = document.querySelector('.turn:last-of-type .answer');
            const leaves = [...answer.querySelectorAll('[data-from]')], range = document.createRange();
            const first = leaves.find((leaf) => Number(leaf.dataset.to) > arguments[0]), last = leaves.at(-1);
            first.scrollIntoView({block: 'center'});
            const ends = [[first, Math.max(0, arguments[0] - first.dataset.from)], [last, last.textContent.length - 1]];
            return ends.map(([leaf, at]) => {
                range.setStart(leaf.firstChild, at); range.setEnd(leaf.firstChild, at + 1);
                const box = range.getBoundingClientRect();
                return [box.left, box.right, box.top + box.height / 2].map(Math.round);
            });"""
        (left, _, top), (_, right, bottom) = self.browser.run(corners, spans[0][0])
        time.sleep(MOVING)
        hand = ActionChains(self.browser.driver).w3c_actions
        hand.pointer_action.move_to_location(left + 1, top).pointer_down().pause(MOVING)
        hand.pointer_action.move_to_location(right, bottom).pointer_up()
        hand.perform()
        self.browser.until(lambda: self.browser.all("[data-do=reject-part]"), 30)
        self.click("[data-do=reject-part]")
        self.browser.until(lambda: self.browser.all(".text del"))
        return spans[0][0]


if __name__ == "__main__":
    loop()
