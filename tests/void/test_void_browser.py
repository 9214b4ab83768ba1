"""The page as people use it, in headless Chromium: by mouse and by keyboard, small and dark, twice at once."""

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

from browsers import CHROMIUM, DRIVER, Browser, browsing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="there is no chromium with its chromedriver on the path (Debian: chromium, chromium-driver)",
    ),
]

SCRIPT = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"


@pytest.fixture
def void(base: Path, tmp_path: Path) -> Iterator[Process]:
    with running(base, tmp_path / "void") as process:
        yield process


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path) as opened:
        yield opened
        assert opened.complaints() == []


def test_the_whole_loop(void: Process, browser: Browser, tmp_path: Path) -> None:
    browser.open(void)
    browser.until(lambda: "nothing trained yet" in browser.text("#models"))
    assert not browser.find("#train-button").is_enabled()
    (before,) = browser.ask("Give me two tips.")
    browser.look("asked")

    browser.press("1")  # reject
    browser.until(lambda: browser.text("#count") == "1")
    browser.await_marked(before)
    browser.find(".said input").send_keys("It is nonsense.", Keys.ENTER)
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"] == "It is nonsense.")
    browser.look("rejected")
    browser.press("u")  # undo
    browser.until(lambda: browser.text("#count") == "0")
    browser.await_marked()
    browser.find("[data-slot='0']").click()  # and once more, with the mouse
    browser.until(lambda: browser.text("#count") == "1")

    browser.find("nav a[href='#rejections']").click()
    browser.until(lambda: len(browser.all("#rows tr")) == 1)
    assert "Give me two tips." in browser.text("#rows")
    browser.look("rejections")
    browser.find("#export").click()
    exported = browser.until(lambda: (tmp_path / "records.jsonl").exists() and (tmp_path / "records.jsonl").read_text())
    assert json.loads(exported)["rejected_responses"] == [before]

    browser.find("nav a[href='#talk']").click()
    assert browser.find("#steps").get_attribute("value") == "12"
    browser.find("#train-button").click()
    browser.until(lambda: browser.all("#live-chart polyline"))
    browser.look("training")
    browser.until(lambda: "is done" in browser.text("#train-state"), 120)
    base_answer, trained_answer = browser.ask("Give me two tips.")
    assert base_answer == before != trained_answer
    assert browser.contents("#answers h2")[1] == "trained: run 1"
    browser.look("trained")

    browser.find("nav a[href='#runs']").click()
    browser.click("#runs a")
    browser.until(lambda: browser.all("#card td"))
    assert len(browser.all("#run-chart polyline")) == 3
    assert "gap" in browser.attribute("#run-chart svg", "aria-label")
    assert browser.contents("#samples .text") == [before, trained_answer]
    assert "Base model" in browser.contents("#card")[0]
    browser.look("run")


def test_only_the_selected_part_is_rejected_by_mouse_and_by_keyboard(void: Process, browser: Browser) -> None:
    browser.open(void)
    (text,) = browser.ask("Give me two tips.")
    select = """
        const node = document.querySelector('#answers .text'), range = document.createRange();
        range.setStart(node.firstChild, arguments[0]); range.setEnd(node.firstChild, arguments[1]);
        getSelection().removeAllRanges(); getSelection().addRange(range);"""
    browser.run(select, 3, 9)
    browser.until(lambda: browser.find("[data-part]").is_displayed())
    browser.look("selected")
    browser.find("[data-part]").click()
    rows = browser.until(lambda: void.get("rejections")["rows"])
    characters = [len(text.encode("utf-16-le")[: 2 * at].decode("utf-16-le")) for at in (3, 9)]
    assert rows[0]["spans"] == [characters]
    browser.await_marked(text[slice(*characters)])

    browser.find("#answers .text").send_keys(Keys.ARROW_RIGHT)  # the caret goes word by word
    browser.find("#answers .text").send_keys(Keys.SHIFT + Keys.ARROW_RIGHT)
    chosen = browser.run("return getSelection().toString()")
    assert chosen
    assert chosen in text
    browser.find("#answers .text").send_keys("1")
    rows = browser.until(lambda: len(found := void.get("rejections")["rows"]) == 2 and found)
    assert text[slice(*rows[0]["spans"][0])] == chosen


def test_offsets_are_characters_where_the_browser_counts_units(void: Process, browser: Browser) -> None:
    browser.open(void)
    found = browser.run(
        "return import('./app.js').then(() => { const text = 'a🙂b漢c'; return Array.from(text.slice(0, 4)).length; })"
    )
    assert found == 3
    record = {"prompt": "emoji", "rejected_responses": ["a🙂b漢c"], "rejected_spans": [[[1, 3]]]}
    void.client.post(
        "/api/import?uid=upload-01",
        content=json.dumps(record).encode(),
        headers={"Content-Type": "application/octet-stream"},
    ).raise_for_status()
    browser.open(void, "#rejections")
    browser.until(lambda: browser.all("#rows mark"))
    assert browser.text("#rows mark") == "🙂b"


def test_markup_in_prompt_answer_and_reason_stays_text(void: Process, browser: Browser, tmp_path: Path) -> None:
    browser.open(void)
    browser.ask(SCRIPT)
    browser.press("1")
    browser.until(lambda: browser.all(".said input"))
    browser.find(".said input").send_keys(SCRIPT, Keys.ENTER)
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"] == SCRIPT)
    upload = tmp_path / "upload.jsonl"
    upload.write_text(json.dumps({"prompt": SCRIPT + "2", "rejected": SCRIPT}))
    browser.find("nav a[href='#rejections']").click()
    browser.find("#import-file").send_keys(str(upload))
    browser.until(lambda: len(browser.all("#rows tr")) == 2)
    assert "1 rejection of 1 prompt imported" in browser.text("#import-state")
    table = browser.text("#rows")
    assert table.count("<script>") == 4
    assert browser.all("#rows script, #rows img, #rows b") == []
    browser.look("markup")
    browser.find("nav a[href='#talk']").click()
    assert browser.text("#asked") == SCRIPT
    time.sleep(0.2)
    assert browser.driver.title == "The Void"


def test_a_bad_upload_is_explained(void: Process, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "rejected": "a"}\n{oops\n')
    browser.open(void, "#rejections")
    browser.find("#import-file").send_keys(str(tmp_path / "bad.jsonl"))
    browser.until(lambda: "line 2: is not valid JSON" in browser.text("#import-state"))
    assert browser.all("#rows tr") == []


def test_a_file_is_asked_about_where_it_was_there_before_or_has_columns_of_its_own(
    void: Process, browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "log.jsonl").write_text('{"prompt": "p", "rejected": "a"}\n')
    (tmp_path / "ours.csv").write_text("question,reply,stars\nWhy?,Because.,1\n")
    browser.open(void, "#rejections")
    browser.find("#import-file").send_keys(str(tmp_path / "log.jsonl"))
    browser.until(lambda: "1 rejection of 1 prompt imported" in browser.text("#import-state"))
    browser.find("#import-file").send_keys(str(tmp_path / "log.jsonl"))
    browser.until(lambda: "imported before" in browser.text("#import-dialog"))
    browser.look("imported-before")
    browser.find("#import-dialog button[value='']").click()
    browser.until(lambda: "is not imported" in browser.text("#import-state"))
    browser.find("#import-file").send_keys(str(tmp_path / "ours.csv"))
    browser.until(lambda: "Which columns" in browser.text("#import-dialog"))
    for role, column in (("prompt", "question"), ("answer", "reply")):
        browser.find(f"#import-dialog select[name='{role}'] option[value='{column}']").click()
    browser.look("columns")
    browser.find("#import-dialog button[value='ok']").click()
    browser.until(lambda: browser.text("#count") == "2")
    browser.click("#imports button")
    browser.until(lambda: browser.text("#count") == "1")
    assert "undone" in browser.text("#imports")


def test_an_undone_rejection_comes_back_with_its_reason(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.ask("Give me a tip.")
    browser.press("1")
    browser.until(lambda: browser.all(".said input"))
    browser.find(".said input").send_keys("It is nonsense.")  # typed, and not sent
    browser.click(".said button[type='button']")
    browser.until(lambda: browser.text("#count") == "0")
    browser.click("#toast button")
    browser.until(lambda: browser.text("#count") == "1")
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"] == "It is nonsense.")
    browser.press("u")
    browser.until(lambda: browser.text("#count") == "0")
    browser.press("1")
    browser.until(lambda: browser.text("#count") == "1")
    assert void.get("rejections")["rows"][0]["reason"] == "It is nonsense."


def test_a_reload_in_the_middle_of_an_answer_loses_nothing(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.find("#prompt").send_keys("A very long story, please.", Keys.ENTER)
    browser.until(lambda: browser.all("#answers .text"))
    browser.driver.refresh()
    (text,) = browser.texts()
    assert text
    assert text == void.get(f"questions/{browser.driver.current_url.rpartition('/')[2]}")["answers"][0]["text"]


def test_what_was_rejected_is_still_marked_after_a_reload(void: Process, browser: Browser) -> None:
    browser.open(void)
    (text,) = browser.ask("Give me a tip.")
    browser.press("1")
    browser.until(lambda: browser.all(".said input"))
    browser.find(".said input").send_keys("It is nonsense.", Keys.ENTER)
    browser.until(lambda: void.get("rejections")["rows"][0]["reason"])
    browser.driver.refresh()
    browser.await_marked(text)
    assert browser.texts() == [text]
    assert not browser.find("[data-slot='0']").is_enabled()  # it is not rejected twice
    assert browser.find(".said input").get_attribute("value") == "It is nonsense."
    browser.press("u")
    browser.until(lambda: browser.text("#count") == "0")
    browser.await_marked()


def test_two_browsers_at_once(void: Process, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with browsing(tmp_path / "other") as other:
        for person in (browser, other):
            person.open(void)
        first = [person.ask("What is it?") for person in (browser, other)]
        assert first[0] == first[1]
        for person in (browser, other):
            person.press("1")
        for person in (browser, other):
            person.until(lambda person=person: person.text("#count") == "2")  # type: ignore[misc]
        other.find("nav a[href='#rejections']").click()
        other.until(lambda: other.all("#rows td"))
        assert other.text("#rows td").endswith("2")
        browser.await_marked(*first[0])
        browser.press("u")
        other.until(lambda: other.text("#rows td").endswith("1"))  # told without asking
        assert void.get("state")["rejections"] == 1


def test_a_server_that_comes_back_finds_its_page_waiting(base: Path, browser: Browser, tmp_path: Path) -> None:
    with running(base, tmp_path / "void") as void:
        browser.open(void)
        (text,) = browser.ask("Give me a tip.")
        browser.press("1")
        browser.await_marked(text)
        browser.until(lambda: browser.text("#count") == "1")  # from when on one can train
        browser.run("const steps = document.getElementById('steps'); steps.value = 60;")
        browser.find("#train-button").click()
        browser.until(lambda: ((void.get("runs")["runs"] or [{}])[0].get("step") or 0) > 12)
        void.stop(signal.SIGKILL)
    browser.until(lambda: browser.find("#away").is_displayed(), 5)
    browser.press("u")  # while nobody listens: it is sent again until somebody does
    again = Process(base, tmp_path / "void", void.port)
    try:
        browser.until(lambda: browser.text("#count") == "0")
        browser.until(lambda: "is done" in browser.text("#train-state"), 120)
        assert len(again.get("runs")["runs"]) == 1
        assert [point["step"] for point in again.get("runs/1")["points"]] == list(range(1, 61))
        assert len(browser.ask("Give me a tip.")) == 2
    finally:
        again.stop()


def test_a_blind_question_is_revealed_on_demand(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.find("#blind").click()
    browser.ask("Who is it?")
    assert browser.contents("#answers h2") == ["Answer 1"]
    browser.find("#reveal").click()
    browser.until(lambda: browser.contents("#answers h2")[0].startswith("base: "))


def test_a_phone_and_the_dark(void: Process, browser: Browser) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)  # type: ignore[attr-defined]
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)  # type: ignore[attr-defined]
    browser.open(void)
    browser.ask("A" + "very" * 40 + "long word, and what of it?")
    browser.press("1")
    browser.until(lambda: browser.text("#count") == "1")
    browser.look("phone-dark")
    for place in ("#talk", "#rejections", "#runs"):
        browser.open(void, place)
        browser.until(lambda: browser.text("#count") == "1")
        width = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], place
        browser.look(f"phone-dark-{place[1:]}")
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(20, 19, 17)"


def test_all_of_it_by_keyboard(void: Process, browser: Browser) -> None:
    browser.open(void)
    browser.until(lambda: browser.text("#models"))
    reached = set()
    body = browser.find("body")
    for _ in range(14):
        body.send_keys(Keys.TAB)
        body = browser.driver.switch_to.active_element
        reached.add(body.get_attribute("id") or body.text.split()[0] if body.text or body.get_attribute("id") else "")
        look = "const at = document.activeElement; return at === document.body || getComputedStyle(at).outlineStyle"
        assert browser.run(look) != "none"  # it can be seen where one is
    assert {"prompt", "blind", "steps", "Talk", "Rejections", "Runs"} <= reached
    browser.press("/")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "prompt"
    browser.driver.switch_to.active_element.send_keys("hello 1 2 u", Keys.ENTER)
    browser.until(lambda: browser.text("#asked") == "hello 1 2 u")
    browser.texts()
    assert void.get("state")["rejections"] == 0  # typing a key is not pressing it


def test_a_token_is_asked_for_and_kept_out_of_the_address(base: Path, browser: Browser, tmp_path: Path) -> None:
    with running(base, tmp_path / "void", "--host", "0.0.0.0", BULEYEAN_VOID_TOKEN="the-token") as void:
        browser.open(void)
        browser.until(lambda: browser.find("#token-dialog").is_displayed())
        assert not browser.find("#token-problem").is_displayed()
        for wrong in ("the-tokem", "žluť"):
            browser.find("#token").send_keys(wrong, Keys.ENTER)
            browser.until(lambda: browser.all("#token-dialog[open]") and browser.all("#token-problem:not([hidden])"))
        browser.find("#token").clear()
        browser.find("#token").send_keys("the-token", Keys.ENTER)
        browser.until(lambda: browser.text("#models").startswith("base: "))
        browser.driver.execute_script("sessionStorage.clear()")
        browser.open(void, "#token=the-token")
        browser.driver.refresh()
        browser.until(lambda: browser.text("#models").startswith("base: "))
        assert "the-token" not in browser.driver.current_url
        assert browser.ask("hello")


def test_ten_thousand_rejections_are_no_burden(void: Process, browser: Browser) -> None:
    lines = [json.dumps({"prompt": f"prompt {n}", "rejected": f"answer {n} " + "words " * 100}) for n in range(10_000)]
    void.client.post(
        "/api/import?uid=upload-01",
        content="\n".join(lines).encode(),
        headers={"Content-Type": "application/octet-stream"},
        timeout=60,
    ).raise_for_status()
    browser.open(void, "#rejections")
    browser.until(lambda: len(browser.all("#rows tr")) == 50)
    assert "10,000 rejected answers, page 1 of 200" in browser.text("#where")
    for path in ("rejections?page=0", "rejections?page=150", "state", "runs"):
        took = []
        for _ in range(5):
            started = time.perf_counter()
            void.get(path)
            took.append(time.perf_counter() - started)
        assert min(took) < 0.1, path
    browser.find("#older").click()
    browser.until(lambda: "page 2 of 200" in browser.text("#where"))
