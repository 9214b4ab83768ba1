"""Records as hypothesis draws them, and rows written to a file."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from buleyean_rl.data.records import RejectionRecord, make_record

# Any text a file can hold, but so few prompts and answers that they repeat.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
FILLED = TEXTS.filter(str.strip)
ANSWERS = st.one_of(st.just(""), st.sampled_from(["a", "ab", "abc"]), FILLED)
MESSAGES = st.tuples(st.sampled_from(["user", "system", "assistant"]), TEXTS)
CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=3).map(lambda turns: (*turns, ("user", "and now?")))
PROMPTS = st.one_of(st.sampled_from(["p", "q"]), FILLED, CONVERSATIONS)


@st.composite
def drawn_records(draw: st.DrawFn) -> RejectionRecord:
    """A record of any prompt, counts and spans."""
    prompt = draw(PROMPTS)
    responses = draw(st.lists(ANSWERS, min_size=1, max_size=4))
    counts = draw(st.lists(st.integers(0, 9), min_size=len(responses), max_size=len(responses)))
    spans = []
    for response in responses:
        pairs = st.tuples(st.integers(0, len(response)), st.integers(0, len(response)))
        drawn = draw(st.lists(pairs, max_size=3)) if response else []
        spans.append([list(pair) for pair in drawn if pair[0] < pair[1]])
    total = draw(st.none() | st.integers(max(1, *counts), 99))
    rounds = (
        [draw(st.integers(max(1, count), 99)) for count in counts] if total is None and draw(st.booleans()) else None
    )
    if not isinstance(prompt, str):
        prompt = [{"role": role, "content": content} for role, content in prompt]
    return make_record(prompt, responses, counts, total, spans, rounds=rounds)


def write_rows(path: Path, *rows: object) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
