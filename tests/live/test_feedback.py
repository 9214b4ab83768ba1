"""Feedback: completions that are remembered with their tokens, rejected, and trained on as records."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import read_records
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.live import completions as store
from buleyean_rl.live.completions import CompletionStore, UnknownCompletion
from buleyean_rl.live.target import Target
from buleyean_rl.live.transcript import Completion, Transcript
from served import served
from tiny import tiny_tokenizer

TARGET = Target("my-run", "tiny", "tiny.gguf", "adapter.gguf", "0" * 32)
ASKED = [{"role": "user", "content": "Why?"}]
WRONG = {"rejected": True, "spans": [], "reason": ""}


def completion(number: int, answer: str = "Because.") -> Completion:
    return Completion(f"chatcmpl-{number}", ASKED, answer, [1, 2], True, 0.0)


class FullDisk(io.BytesIO):
    def write(self, *_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def records(folder: Path) -> list[Any]:
    return list(read_records(folder / store.RECORDS))


def test_a_rejected_completion_is_a_record_with_the_tokens_that_were_drawn(
    targets: dict[str, Target], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    target = replace(targets["first"], tokenizer=tokenizer_hash(tokenizer))

    async def run() -> None:
        async with served(target, completions=completions) as server:
            whole = (await server.ask("Give me two tips.")).json()
            assert not {"__verbose"} & whole.keys()
            text, _, events = await server.hear("Give me two tips.")
            assert not [choice for event in events for choice in event["choices"] if "logprobs" in choice]
            assert text == whole["choices"][0]["message"]["content"]
            for identity, more in ((whole["id"], {}), (events[0]["id"], {"spans": [[0, 2]], "reason": "too\nshort"})):
                body = {"completion_id": identity} | more
                assert (await server.client.post("/buleyean/feedback", json=body)).status_code == 200
            for body in ({"completion_id": "none"}, {"completion_id": whole["id"], "spans": [[5, 1]]}, {"spans": []}):
                refused = await server.client.post("/buleyean/feedback", json=body)
                assert (refused.status_code in (400, 404), bool(refused.json()["error"]["message"])) == (True, True)

    with closing(CompletionStore(tmp_path)) as completions:
        asyncio.run(run())
    whole, part = records(tmp_path)
    assert (whole.prompt, whole.rejection_counts, whole.rounds) == ("Give me two tips.", (1,), (1,))
    assert whole.policy == {"model": "tiny", "adapter": "first", "temperature": 0.0}
    assert part.rejected_spans == (((0, 2),),)
    for record in (whole, part):
        if record.token_ids[0] is not None:  # of a character of several tokens a stream reports the last
            assert tokenizer.decode(record.token_ids[0]) == record.rejected_responses[0]
    assert whole.token_ids[0] is not None
    assert json.loads((tmp_path / store.RECORDS).read_text().splitlines()[1])["remark"] == "too short"


def test_a_stream_with_tools_is_answered_and_not_remembered(targets: dict[str, Target], tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

    async def run() -> None:
        async with served(targets["tiny"], completions=completions) as server:
            body = {"messages": ASKED, "max_tokens": 4, "stream": True, "tools": tools, "tool_choice": "none"}
            reply = await server.client.post("/v1/chat/completions", json=body)
            assert (reply.status_code, "data: " in reply.text) == (200, True), reply.text
            identity = json.loads(reply.text.partition("\n")[0].removeprefix("data: "))["id"]
            refused = await server.client.post("/buleyean/feedback", json={"completion_id": identity})
            assert refused.status_code == 404

    with closing(CompletionStore(tmp_path)) as completions:
        asyncio.run(run())


def test_feedback_that_cannot_be_written_is_told_and_leaves_the_records_whole(
    targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def judge(identity: str) -> int:
        async with served(targets["tiny"], completions=completions) as server:
            return (await server.client.post("/buleyean/feedback", json={"completion_id": identity})).status_code

    def truncate(path: Path, end: int) -> None:
        cut.append((path.name, end))

    cut: list[tuple[str, int]] = []
    with closing(CompletionStore(tmp_path)) as completions:
        for number in range(2):
            completions.add(completion(number), TARGET, is_base=False)
        completions.judge("chatcmpl-0", WRONG)
        before = (tmp_path / store.RECORDS).read_bytes()
        with monkeypatch.context() as full:
            full.setattr(store.Path, "open", lambda *_: FullDisk())
            full.setattr(store.os, "truncate", truncate)
            with pytest.raises(OSError, match="No space left"):
                completions.judge("chatcmpl-1", WRONG)
        assert cut == [(store.RECORDS, len(before))]
        assert completions.judge("chatcmpl-1", WRONG) == 2  # its first verdict was taken back
        completions._db.execute("DROP TABLE completions")
        assert asyncio.run(judge("chatcmpl-1")) == 500


def test_who_remembers_nothing_says_so(targets: dict[str, Target]) -> None:
    async def run() -> None:
        async with served(targets["tiny"]) as server:
            reply = await server.client.post("/buleyean/feedback", json={"completion_id": "x"})
            assert (reply.status_code, "--remember" in reply.text) == (404, True)

    asyncio.run(run())


def test_the_last_word_on_a_completion_counts(tmp_path: Path) -> None:
    with closing(CompletionStore(tmp_path)) as completions:
        for number in range(2):
            completions.add(completion(number), TARGET, is_base=False)
            assert completions.judge(f"chatcmpl-{number}", WRONG) == number + 1
        completions.judge("chatcmpl-0", WRONG | {"rejected": False})
        with pytest.raises(RecordError, match="spans"):
            completions.judge("chatcmpl-1", {"rejected": False, "spans": [[0, 1]], "reason": ""})
    assert [record.rejection_counts for record in records(tmp_path)] == [(0,), (1,)]
    (tmp_path / store.RECORDS).unlink()
    with closing(CompletionStore(tmp_path)):
        assert len(records(tmp_path)) == 2  # made anew from what was said


def test_what_was_not_judged_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_COMPLETIONS", 3)
    with closing(CompletionStore(tmp_path)) as completions:
        for number in range(5):
            completions.add(completion(number), TARGET, is_base=True)
        completions.judge("chatcmpl-0", WRONG)
        completions._sweep()
        for number in (1,):
            with pytest.raises(UnknownCompletion):
                completions.judge(f"chatcmpl-{number}", WRONG)
        now = time.time()
        monkeypatch.setattr(store.time, "time", lambda: now + store.KEEP_SECONDS + 1)
        completions._sweep()
        with pytest.raises(UnknownCompletion):
            completions.judge("chatcmpl-4", WRONG)
        assert completions.judge("chatcmpl-0", WRONG) == 1


def test_another_programs_file_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / store.DATABASE).write_bytes(b"theirs" * 300)
    with pytest.raises(UsageError, match="name another folder"):
        CompletionStore(tmp_path)
    assert (tmp_path / store.DATABASE).read_bytes() == b"theirs" * 300


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "tool", "content": "7"}]},
        {"messages": "hello"},
    ],
)
def test_only_plain_conversations_are_remembered(body: dict[str, Any]) -> None:
    transcript = Transcript(body)
    transcript.read({"id": "x", "choices": [{"index": 0, "message": {"content": "Yes."}, "finish_reason": "stop"}]})
    assert transcript.completion() is None


def test_an_answer_of_several_choices_or_calls_of_tools_is_not_remembered() -> None:
    for choice in ({"index": 1, "message": {"content": "No."}}, {"index": 0, "message": {"tool_calls": []}}):
        transcript = Transcript({"messages": ASKED})
        transcript.read({"id": "x", "choices": [{"index": 0, "message": {"content": "Yes."}}, choice]})
        assert transcript.completion() is None
