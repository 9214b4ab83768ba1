"""Files of prompts, of lines and of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.errors import RecordError
from drawn import write_rows

TALK = [{"role": "human", "content": "Hi"}, {"role": "bot", "content": "Hello."}, {"role": "user", "content": "And?"}]
PARSED = (("user", "Hi"), ("assistant", "Hello."), ("user", "And?"))


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "One?\n\n Two? \nOne?\n", ["One?", "Two?"]),
        ("a.jsonl", json.dumps({"prompt": "One?"}) + "\n" + json.dumps({"messages": TALK}), ["One?", PARSED]),
        ("a.json", json.dumps([{"prompt": "One?"}, {"question": "Two?"}], indent=1), ["One?", "Two?"]),
        ("a.csv", "ID,Prompt (one line)\n1,One?\n2,Two?\n", ["One?", "Two?"]),
        ("a.csv", "id,prompt\n1,One?\n2,Two?\n", ["One?", "Two?"]),
        ("a.jsonl", json.dumps({"prompt": "One?", "system": "S"}), [(("system", "S"), ("user", "One?"))]),
    ],
)
def test_prompts_of_every_kind_of_file(tmp_path: Path, name: str, text: str, prompts: list[object]) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == prompts


def test_a_row_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for row, problem in (
        ({"text": "One?"}, r"a.jsonl:1: has no prompt \(its keys: text\)"),
        ({"prompt": "One?", "documents": ["a page"]}, "a.jsonl:1: has documents, which no prompt can hold"),
        ({"prompt": "One?", "images": ["x.png"]}, "a.jsonl:1: its prompt came with images"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(RecordError, match=problem):
            read_prompts(path)


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \none\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "é", "x": 1}, {"messages": conversation})
    assert read_prompts(path) == ["é", (("system", "s"), ("user", "u"))]


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    for name, content, problem in (
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"one\n\xffwo", "p.txt:2: is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "p.jsonl:2: the prompt is empty"),
        ("missing.txt", None, "missing.txt: no such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordError, match=problem):
            read_prompts(tmp_path / name)
