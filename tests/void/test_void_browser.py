"""The page as people use it, in headless Chromium: by mouse and by keyboard, twice at once, killed and back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from voids import Process, running

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver.common.keys import Keys

from browsers import IN_CHROMIUM, Browser, browsing

pytestmark = IN_CHROMIUM

SCRIPT = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"
REASON = ".state input"


@pytest.fixture
def void(base: Path, tmp_path: Path) -> Iterator[Process]:
    with running(base, tmp_path / "void") as process:
        yield process


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path) as opened:
        yield opened
        assert opened.complaints() == []


def count(void: Process) -> int:
    return void.get("state")["rejections"]


def test_from_the_first_visit_to_a_file(void: Process, browser: Browser, tmp_path: Path) -> None:
    browser.open(void)
    browser.until(lambda: browser.all(".start"))
    assert browser.attribute("#train", "title").startswith("Reject something first")
    browser.click(".prompts button")  # a prompt to click
    (before,) = browser.texts()
    browser.until(lambda: browser.text("#said").endswith("answered."))
    browser.press("1")
    browser.until(lambda: browser.all(".answer.rejected"))
    browser.find(REASON).send_keys("It is nonsense.", Keys.ENTER)
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"] == "It is nonsense.")
    browser.until(lambda: "It is nonsense." in browser.text("#side"))
    browser.press("u")
    browser.until(lambda: not browser.all(".answer.rejected"))
    browser.click("[data-do=reject]")  # and again, by mouse
    browser.until(lambda: browser.all(".answer.rejected"))
    browser.until(lambda: "1 rejection" in browser.text("#sentence"))

    browser.click("#train")
    browser.until(lambda: browser.all("#stop") and browser.find("#stop").is_displayed())
    browser.until(lambda: browser.all("#verdict:not([hidden]) [data-do=keep]"), 180)
    assert "nlearned" in browser.text("#verdict .verdict")  # or "Nothing was unlearned"
    browser.until(lambda: "Training has ended" in browser.text("#said"))
    browser.click("[data-do=keep]")
    browser.until(lambda: not browser.find("#verdict").is_displayed())
    browser.until(lambda: browser.all(".start"))  # a new conversation, with what was rejected to be asked again
    assert browser.find("#prompt").get_attribute("value") == "Give me two tips for sleeping better."
    browser.find("#prompt").send_keys(Keys.ENTER)
    browser.until(lambda: len(browser.all(".answer")) == 2)
    base_answer, trained_answer = browser.texts()
    assert base_answer == before
    assert trained_answer

    browser.find("nav a[href='#models']").click()
    browser.click("#models h2 a")
    name = browser.until(lambda: browser.all("#model-name") and browser.find("#model-name"))
    name.send_keys(Keys.CONTROL + "a")
    name.send_keys("sleep tips", Keys.ENTER)
    browser.until(lambda: void.get("runs/1")["name"] == "sleep tips")
    row = "#files [data-kind=records]"
    browser.until(lambda: browser.all(row))
    browser.click(f"{row} button")
    found = browser.until(lambda: [path for path in tmp_path.glob("*.jsonl") if path.stat().st_size])
    assert json.loads(found[0].read_text())["rejected_responses"] == [void.get("rejections")["rows"][0]["answer"]]
    browser.click("#details summary")
    browser.until(lambda: browser.all("#details polyline"))


def test_only_the_selected_part_is_rejected_by_mouse_and_by_keyboard(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.ask("Give me two tips.")
    answer = void.get(f"turns/{last_turn(void)}")["answers"][0]
    browser.select(0, 2)
    selected = browser.run("return getSelection().toString()")
    browser.find("[data-do=reject-part]").click()
    rows = browser.until(lambda: void.get("rejections")["rows"])
    [[start, end]] = rows[0]["spans"]
    assert answer["text"][start:end] == selected
    browser.await_marked(selected)
    browser.click("del[tabindex]")
    browser.until(lambda: browser.all("#marking button"))
    browser.find("#marking button").click()  # undone where it stands
    browser.await_marked()

    text = browser.find(".text")
    text.send_keys(Keys.ARROW_RIGHT)  # the caret goes word by word
    text.send_keys(Keys.SHIFT + Keys.ARROW_RIGHT)
    chosen = browser.run("return getSelection().toString()").strip()
    text.send_keys("1")
    rows = browser.until(lambda: void.get("rejections")["rows"])
    [[start, end]] = rows[0]["spans"]
    assert answer["text"][start:end].strip() == chosen


def last_turn(void: Process) -> str:
    conversation = void.get("conversations")["conversations"][0]["id"]
    return void.get(f"conversations/{conversation}")["turns"][-1]["id"]


def test_a_conversation_goes_on_and_is_stopped_continued_and_asked_again(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.until(lambda: browser.all(".start"))
    browser.click("#options")
    browser.until(lambda: browser.all("dialog[open]"))
    browser.find("dialog [name=system]").send_keys("Be brief.")
    browser.find("dialog [name=max_tokens] option[value='128']").click()
    browser.click("dialog button[value=ok]")
    browser.until(lambda: "with a system prompt" in browser.text("#ask .why"))
    browser.ask("One.")
    browser.ask("Two.")
    conversation = void.get("conversations")["conversations"][0]
    assert conversation["turns"] == 2
    assert [turn["settings"]["system"] for turn in void.get(f"conversations/{conversation['id']}")["turns"]] == [
        "Be brief."
    ] * 2
    first = void.get(f"turns/{last_turn(void)}")["answers"][0]["id"]
    browser.click(".turn:last-of-type [data-do=again]")
    browser.until(lambda: void.get(f"turns/{last_turn(void)}")["answers"][0]["id"] != first)
    browser.texts()
    browser.click("#new")
    browser.until(lambda: browser.all(".start"))
    browser.click("#conversations li a")
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert browser.driver.title == "One. · The Void"
    browser.click("#conversations .delete")
    browser.until(lambda: not browser.all("#conversations li"))
    browser.click("#toast button")  # undone
    browser.until(lambda: len(browser.all(".turn")) == 2)


def test_markup_in_prompt_answer_reason_and_names_stays_text(void: Process, browser: Browser, tmp_path: Path) -> None:
    browser.open(void)
    browser.ask(SCRIPT)
    browser.press("1")
    browser.until(lambda: browser.all(REASON))
    browser.find(REASON).send_keys(SCRIPT, Keys.ENTER)
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"] == SCRIPT)
    upload = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    upload.write_text(json.dumps({"prompt": SCRIPT + "2", "rejected": SCRIPT}))
    browser.find("nav a[href='#rejections']").click()
    browser.until(lambda: browser.all("#rows tr"))
    browser.find("#import-file").send_keys(str(upload))
    browser.until(lambda: browser.all("dialog[open]"))
    assert "1 rejection of 1 prompt" in browser.text("dialog")
    browser.click("dialog button[value=ok]")
    browser.until(lambda: len(browser.all("#rows tr")) == 2)
    assert browser.text("#rows").count("<script>") >= 3
    assert browser.all("main script, main img, #rows b") == []
    browser.find("nav a[href='#talk']").click()
    browser.until(lambda: SCRIPT[:40] in browser.text("#conversations"))
    assert browser.all("#conversations img") == []
    time.sleep(0.2)
    assert "broken" not in browser.driver.title.replace(SCRIPT[:20], "").replace("'broken'", "")


def test_a_file_is_shown_before_it_is_taken(void: Process, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "rejected": "a"}\n{oops\n')
    (tmp_path / "log.jsonl").write_text('{"prompt": "p", "rejected": "a"}\n')
    (tmp_path / "ours.csv").write_text("question,reply,stars\nWhy?,Because.,1\n")
    browser.open(void, "#rejections")
    browser.until(lambda: browser.all("#import-file"))

    def pick(name: str, then: str) -> None:
        browser.find("#import-file").send_keys(str(tmp_path / name))
        browser.until(lambda: then in browser.text("dialog[open]") or then in browser.text("#toast"))

    pick("bad.jsonl", "line 2: is not valid JSON")
    assert count(void) == 0
    pick("log.jsonl", "1 rejection of 1 prompt")
    browser.click("dialog button[value='']")
    browser.until(lambda: not browser.all("dialog"))
    assert count(void) == 0  # looked at, and not taken
    pick("log.jsonl", "1 rejection of 1 prompt")
    browser.click("dialog button[value=ok]")
    browser.until(lambda: count(void) == 1)
    pick("log.jsonl", "imported before")
    browser.click("dialog button[value='']")
    browser.until(lambda: not browser.all("dialog"))
    pick("ours.csv", "What do these columns hold?")
    for role, column in (("prompt", "question"), ("answer", "reply")):
        browser.find(f"dialog select[name='column-{column}'] option[value='{role}']").click()
    browser.click("dialog button[value=ok]")
    browser.until(lambda: "1 rejection of 1 prompt" in browser.text("dialog[open]"))
    browser.click("dialog button[value=ok]")
    browser.until(lambda: count(void) == 2)
    browser.until(lambda: len(browser.all("#imports li")) == 2)
    browser.click("#imports button")
    browser.until(lambda: count(void) == 1)
    browser.until(lambda: "undone" in browser.text("#imports"))


def test_several_at_once_and_a_search(void: Process, browser: Browser) -> None:
    lines = [json.dumps({"prompt": f"prompt {n}", "rejected": f"answer {n}"}) for n in range(60)]
    void.upload("upload-01", "\n".join(lines).encode()).raise_for_status()
    browser.open(void, "#rejections")
    browser.until(lambda: len(browser.all("#rows tr")) == 50)
    browser.find("#search").send_keys("prompt 37")
    browser.until(lambda: len(browser.all("#rows tr")) == 1)
    browser.find("#rows input[type=text]").send_keys("It is wrong.", Keys.ENTER)
    browser.until(lambda: void.get("rejections?q=37")["rows"][0]["reason"] == "It is wrong.")
    browser.find("#search").clear()
    browser.find("#search").send_keys(Keys.SPACE, Keys.BACKSPACE)
    browser.until(lambda: len(browser.all("#rows tr")) == 50)
    browser.click("thead input")
    browser.until(lambda: "50 chosen" in browser.text(".several"))
    browser.click("[data-do=undo-chosen]")
    browser.until(lambda: count(void) == 10)
    browser.click("#toast button")  # all of them again
    browser.until(lambda: count(void) == 60)


def test_many_are_judged_by_three_keys(void: Process, browser: Browser) -> None:
    browser.open(void, "#judge")
    browser.until(lambda: browser.all("#prompts"))
    browser.find("#prompts").send_keys("One.\nTwo.\nThree.")
    browser.click("#begin")
    browser.until(lambda: browser.text("#card .me") == "One.")
    browser.press("r")
    browser.until(lambda: browser.text("#card .me") == "Two.")
    assert count(void) == 1
    browser.press(" ")
    browser.until(lambda: browser.text("#card .me") == "Three.")
    browser.until(lambda: "2 of 3 judged" in browser.text("#told"))
    browser.press("u")
    browser.until(lambda: browser.text("#card .me") == "Two.")
    browser.press("u")
    browser.until(lambda: browser.text("#card .me") == "One.")
    browser.until(lambda: count(void) == 0)
    for rest in ("2", "1", ""):
        browser.press(" ")
        browser.until(lambda rest=rest: f"{3 - int(rest or 0)} of 3 judged" in browser.text("#told"))  # type: ignore[misc]
    browser.until(lambda: "All judged" in browser.text("#card"))


def test_an_undone_rejection_comes_back_with_its_reason(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.ask("Give me a tip.")
    browser.press("1")
    browser.until(lambda: browser.all(REASON))
    browser.find(REASON).send_keys("It is nonsense.")  # typed, and not sent
    browser.click("[data-do=reject]")  # which is Undo now, in the same place
    browser.until(lambda: count(void) == 0)
    browser.until(lambda: not browser.all(".answer.rejected"))
    browser.press("1")
    browser.until(lambda: count(void) == 1)
    browser.until(lambda: browser.all(REASON) and browser.find(REASON).get_attribute("value") == "It is nonsense.")


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.find("#prompt").send_keys("A very long story, please.", Keys.ENTER)
    browser.until(lambda: browser.all(".answer"))
    browser.driver.refresh()
    browser.texts()
    browser.press("1")
    browser.until(lambda: browser.all(".answer.rejected"))
    browser.driver.refresh()
    browser.until(lambda: browser.all(".answer.rejected"))
    assert browser.text("[data-do=reject]") == "Undo"


def test_two_browsers_at_once(void: Process, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with browsing(tmp_path / "other") as other:
        browser.open(void)
        browser.ask("What is it?")
        other.driver.get(browser.driver.current_url)
        other.texts()
        browser.press("1")
        other.until(lambda: other.all(".answer.rejected"))  # told without asking
        other.press("u")
        browser.until(lambda: not browser.all(".answer.rejected"))
        assert count(void) == 0


def test_a_server_that_comes_back_finds_its_page_waiting(base: Path, browser: Browser, tmp_path: Path) -> None:
    with running(base, tmp_path / "void") as void:
        browser.open(void)
        browser.ask("Give me a tip.")
        browser.press("1")
        browser.until(lambda: browser.all(".answer.rejected"))
        void.post("runs", uid="run-00001", steps=60).raise_for_status()
        browser.until(lambda: (void.get("runs/1")["step"] or 0) > 12)
        void.stop(signal.SIGKILL)
    browser.until(lambda: browser.find("#away").is_displayed(), 5)
    browser.press("u")  # while nobody listens: it is sent again until somebody does
    again = Process(base, tmp_path / "void", void.port)
    try:
        browser.until(lambda: not browser.all(".answer.rejected"))
        browser.until(lambda: browser.all("#verdict:not([hidden]) button"), 180)
        assert [point["step"] for point in again.get("runs/1")["points"]] == list(range(1, 61))
        assert len(browser.ask("Give me a tip.")) == 2
    finally:
        again.stop()


def test_a_blind_question_is_revealed_on_demand(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.until(lambda: browser.all(".start"))
    browser.click("#options")
    browser.until(lambda: browser.all("dialog[open]"))
    browser.click("dialog [name=blind]")
    browser.click("dialog button[value=ok]")
    browser.ask("Who is it?")
    assert browser.contents(".answer h3") == ["Answer A"]
    browser.click("[data-do=reveal]")
    browser.until(lambda: browser.contents(".answer h3") == [void.get("state")["pair"][0]["name"]])


def test_the_panels_of_a_phone_hold_the_focus_and_give_it_back(void: Process, browser: Browser) -> None:
    browser.resize(360, 740)
    browser.open(void)
    browser.until(lambda: browser.all(".start"))
    for name in ("history", "side"):
        opener = f"#open-{name}"
        browser.find(opener).click()
        browser.until(lambda name=name: browser.find(f"#{name}").is_displayed())  # type: ignore[misc]
        assert browser.run("return document.getElementById('main').inert")
        assert browser.run("return document.activeElement.closest('nav, aside')?.id") == name
        browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        browser.until(lambda name=name: not browser.find(f"#{name}").is_displayed())  # type: ignore[misc]
        assert f"#{browser.driver.switch_to.active_element.get_attribute('id')}" == opener


def test_all_of_it_by_keyboard(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.until(lambda: browser.all(".start"))
    reached = set()
    for _ in range(16):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        at = browser.driver.switch_to.active_element
        reached.add(at.get_attribute("id") or at.text)
        look = "const at = document.activeElement; return at === document.body || getComputedStyle(at).outlineStyle"
        assert browser.run(look) != "none" or at.get_attribute("id") == "prompt"  # its box shows it
    assert {"skip", "new", "Give me two tips for sleeping better.", "prompt", "options", "train"} <= reached
    browser.press("/")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "prompt"
    browser.driver.switch_to.active_element.send_keys("hello 1 2 u", Keys.ENTER)
    browser.until(lambda: browser.text(".me") == "hello 1 2 u")
    browser.texts()
    assert count(void) == 0  # typing a key is not pressing it


def test_a_token_is_asked_for_and_kept_out_of_the_address(base: Path, browser: Browser, tmp_path: Path) -> None:
    with running(base, tmp_path / "void", "--host", "0.0.0.0", BULEYEAN_VOID_TOKEN="the-token") as void:
        browser.open(void)
        browser.until(lambda: browser.all("dialog[open] #token"))
        assert not browser.all("#token-problem")
        for wrong in ("the-tokem", "žluť"):
            browser.find("#token").send_keys(wrong, Keys.ENTER)
            browser.until(lambda: browser.all("dialog[open] #token-problem"))
        browser.until(lambda: browser.all("dialog[open] #token"))
        browser.find("#token").send_keys("the-token", Keys.ENTER)
        browser.until(lambda: browser.text("#names"))
        browser.run("sessionStorage.clear()")
        browser.open(void, "#token=the-token")
        browser.driver.refresh()
        browser.until(lambda: browser.text("#names"))
        assert "the-token" not in browser.driver.current_url
        assert browser.ask("hello")


def test_ten_thousand_rejections_are_no_burden(void: Process, browser: Browser) -> None:
    lines = [json.dumps({"prompt": f"prompt {n}", "rejected": f"answer {n} " + "words " * 100}) for n in range(10_000)]
    void.client.timeout = 60
    void.upload("upload-01", "\n".join(lines).encode()).raise_for_status()
    browser.open(void, "#rejections")
    browser.until(lambda: len(browser.all("#rows tr")) == 50)
    assert "10,000 rejections, page 1 of 200" in browser.text("#where")
    browser.find("#older").click()
    browser.until(lambda: "page 2 of 200" in browser.text("#where"))
