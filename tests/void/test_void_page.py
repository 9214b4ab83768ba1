"""The page's files: what they say is in one of them, and nothing in them would be refused by the content policy."""

from __future__ import annotations

import re
from pathlib import Path

import buleyean_rl.void

PAGE = Path(buleyean_rl.void.__file__).parent / "page"
SCRIPTS = {path.name: path.read_text("utf-8") for path in PAGE.glob("*.js")}
STRINGS = SCRIPTS["strings.js"]


def test_every_text_is_used_and_every_text_that_is_used_is_there() -> None:
    there = set(re.findall(r"^  (\w+)(?=[:,])", STRINGS, re.MULTILINE))
    used = {name for script in SCRIPTS.values() for name in re.findall(r"\bwords\.(\w+)", script)}
    by_page = {"talk", "judge", "rejections", "models"}  # words[page]
    assert there - used - by_page == set()
    assert used - there == set()


def test_no_module_says_anything_of_its_own() -> None:
    """A text between quotes that begins like a sentence, outside strings.js."""
    for name, script in SCRIPTS.items():
        if name != "strings.js":
            code = re.sub(r"^\s*//.*|\s// .*", "", script, flags=re.MULTILINE)
            assert re.findall(r'"[A-Z][a-z]+ [^"]*"', code) == [], name


def test_the_modules_are_there_and_small() -> None:
    for name, script in SCRIPTS.items():
        assert len(script.splitlines()) <= 300, name
        for module in re.findall(r'from "\./([^"]+)"', script):
            assert module in SCRIPTS, f"{name} imports {module}"


def test_nothing_is_inline() -> None:
    html = (PAGE / "index.html").read_text("utf-8")
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html) == []
    for name in re.findall(r'(?:href|src)="([\w.]+)"', html):
        assert (PAGE / name).exists(), name
    assert [name for name, script in SCRIPTS.items() if re.search(r"\beval\(|new Function|\.outerHTML =", script)] == []
    assert [name for name, script in SCRIPTS.items() if "innerHTML" in script] == ["text.js"]
