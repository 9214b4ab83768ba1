"""Rows of every format that can be imported, and ways to break them."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
from random import Random
from typing import Any

ASKED = {"role": "user", "content": "Name a fruit."}
ANSWERED = {"role": "assistant", "content": "Brick."}
TALK = [{"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "Fig."}, ASKED]
TREE = {
    "u": {"id": "u", "parentId": None, **ASKED},
    "a": {"id": "a", "parentId": "u", "annotation": {"rating": -1}, **ANSWERED, "originalContent": "Stone."},
    "b": {
        "id": "b",
        "parentId": "u",
        "annotation": {"rating": 1},
        "role": "assistant",
        "content": "",
        "output": [
            {"type": "reasoning", "content": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Plum."}]},
        ],
    },
}
LIBRECHAT = [
    {"messageId": "1", "parentMessageId": "0", "isCreatedByUser": True, "text": "Name a fruit."},
    {
        "messageId": "2",
        "parentMessageId": "1",
        "isCreatedByUser": False,
        "text": "",
        "feedback": {"rating": "thumbsDown"},
        "content": [{"type": "think", "think": "hm"}, {"type": "text", "text": "Brick."}],
    },
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "records": [
        {"prompt": "p", "rejected_responses": ["a", "b"], "rejection_counts": [2, 1], "total_rounds": 3},
        {"messages": TALK, "rejected": ["abc"], "rejected_spans": [[[0, 2]]]},
    ],
    "pairs": [
        {"prompt": "p", "chosen": "Yes.", "rejected": "No.", "system": "Be kind.", "history": [["a", "b"]]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Y"},
            "rejected": {"from": "gpt", "value": "N"},
        },
        {
            "input": {"messages": [ASKED], "tools": []},
            "preferred_output": [ANSWERED],
            "non_preferred_output": [ANSWERED],
        },
        {"messages": [*TALK, ANSWERED], "rejected_response": "Stone."},
        {"chosen": str([ASKED, ANSWERED]), "rejected": json.dumps([ASKED, {"role": "assistant", "content": "No"}])},
    ],
    "kto": [
        {"messages": [*TALK, ANSWERED], "label": False},
        {"prompt": "p", "completion": "Brick.", "label": True},
        {"prompt": "p", "response": "Brick.", "rating": "BAD"},
    ],
    "ranked": [
        {"prompt": "p", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2.5}]},
        {
            "prompt": "p",
            "candidates": [{"response": "a", "rejection_count": 2}, {"response": "b", "rejection_count": 0}],
        },
    ],
    "openwebui": [
        {"id": "c", "chat": {"history": {"messages": TREE, "currentId": "a"}, "params": {"system": "s"}}},
        {
            "data": {"rating": -1},
            "meta": {"message_id": "a"},
            "snapshot": {"chat": {"chat": {"history": {"messages": TREE}}}},
        },
    ],
    "librechat": [{"conversationId": "c", "messages": LIBRECHAT, "options": {"promptPrefix": "s"}}],
    "traces": [
        {"input": {"messages": TALK}, "output": ANSWERED, "scores": [{"name": "u", "dataType": "BOOLEAN", "value": 0}]},
        {
            "inputs": {"question": "q", "chat_history": [["a", "b"]], "context": "c"},
            "outputs": {"answer": "<think>x</think>a"},
            "feedback_stats": {"u": {"n": 2, "avg": 0.5}},
        },
        {"timestamp": "t", "input": "q", "output": {"choices": [{"message": ANSWERED}]}, "user-feedback": [0, 1]},
    ],
}
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    "",
    " ",
    "\ud800",
    "é",
    "<think>",
    "[{'role': 'user'",
    "👎🏽",
    [],
    {},
    [[]],
    [None],
    ["x"],
    {"role": "assistant", "content": None},
    [ASKED],
    "thumbsDown",
    "--",
    '<details type="reasoning"',
    ["0"] * 50,
    {"type": "image_url"},
    [{"role": "assistant", "tool_calls": [{}]}],
    "x" * 5000,
    3,
    "3",
    "jane@x.example '%'%",
]


def break_row(row: Any, random: Random) -> Any:
    """A row with some of its values replaced, moved, deleted or doubled."""
    row = copy.deepcopy(row)
    for _ in range(random.randint(0, 3)):
        holders = list(_holders(row))
        holder = random.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key, action = random.choice(keys), random.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1:
            holder[key] = copy.deepcopy(random.choice(holders))
        elif action == 2 and isinstance(holder, dict):
            holder[random.choice(["rejected", "label", "messages", "prompt", "content", "role", "score", "x"])] = (
                holder.pop(key)
            )
        elif action == 3:
            holder[key] = json.dumps(holder[key])
        else:
            holder[key] = copy.deepcopy(random.choice(VALUES))
    return row


def _holders(value: Any) -> Any:
    """Every list and object in a value, itself first."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def draw_file(random: Random) -> tuple[str, bytes]:
    """A file's name and content: rows of a format, some of them broken, printed in one of many ways."""
    rows = [
        break_row(random.choice(ROWS[random.choice(list(ROWS))]), random) if random.random() < 0.1 else None
        for _ in range(6)
    ]
    format_rows = ROWS[random.choice(list(ROWS))]
    rows = [row or break_row(random.choice(format_rows), random) for row in rows]
    layout = random.randrange(6)
    if layout == 0:
        name, text = "a.json", json.dumps(rows, indent=random.choice([None, 1]))
    elif layout == 1:
        name, text = "a.csv", _as_table(rows, random)
    elif layout == 2:
        name, text = "a.json", "\n".join(json.dumps(row, indent=1) for row in rows)
    elif layout == 3:
        name, text = "a.jsonl", json.dumps({"data": rows, "meta": {}}) + "\n" + json.dumps(rows)
    else:
        name, text = "a.jsonl", "\n".join(map(json.dumps, rows))
    content = text.encode(random.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), errors="replace")
    for _ in range(random.choice([0, 0, 0, 1, 3])):
        content = _break_bytes(content, random)
    if random.random() < 0.05:
        content = gzip.compress(content)
        content, name = (content[: random.randint(1, len(content))] if random.random() < 0.5 else content), name + ".gz"
    return name, content


def _as_table(rows: list[dict[str, Any]], random: Random) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=random.choice(",;\t"), lineterminator=random.choice(["\n", "\r\n"]))
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow([cell if isinstance(cell, str) else random.choice([str, json.dumps])(cell) for cell in cells])
    return random.choice(["", "", "sep=,\n"]) + file.getvalue().encode(errors="replace").decode()


def _break_bytes(content: bytes, random: Random) -> bytes:
    start = random.randint(0, len(content))
    end = min(len(content), start + random.choice([0, 1, 1, 20]))
    inserted = random.choice(
        [b"", b"\n", b"{", b"]", b'"', b"\0", b"\xff", b",", content[:50], bytes([random.randrange(256)])]
    )
    return content[:start] + inserted + content[end:]
