"""Serving: the OpenAI API, base and trained model side by side, and one run put in another's place."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.errors import EngineError
from buleyean_rl.live.engine import ServedEngine
from buleyean_rl.live.serving import Busy
from buleyean_rl.live.target import Target
from served import no_gate, served, tiny_target

PROMPT = "Give me two tips."
Targets = dict[str, Target]


def text(reply: Any) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def test_base_and_trained_model_answer_side_by_side(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["first"]) as server:
            listed = (await server.client.get("/v1/models")).json()["data"]
            assert [(row["id"], row["run"]) for row in listed] == [("tiny", "first"), ("tiny-base", "base")]
            trained, base = await server.ask(PROMPT, model="tiny"), await server.ask(PROMPT, model="tiny-base")
            assert [reply.headers["X-Buleyean-Run"] for reply in (trained, base)] == ["first", "base"]
            assert [reply.json()["model"] for reply in (trained, base)] == ["tiny", "tiny-base"]
            assert text(trained) != text(base)
            assert text(await server.ask(PROMPT)) == text(trained)  # no name is the trained model's
            assert text(await server.ask(PROMPT, model="tiny-base", lora=[{"id": 0, "scale": 1.0}])) == text(base)
            heard, name, events = await server.hear(PROMPT)
            assert (heard, name) == (text(trained), "first")
            assert {event["model"] for event in events} == {"tiny"}
            plain = await server.client.post(
                "/v1/completions", json={"prompt": "The", "max_tokens": 3, "ignore_eos": True}
            )
            assert plain.json()["usage"]["completion_tokens"] == 3
        async with served(targets["tiny"]) as server:
            listed = (await server.client.get("/v1/models")).json()["data"]
            assert [row["id"] for row in listed] == ["tiny"]
            assert text(await server.ask(PROMPT)) == text(await server.ask(PROMPT, model="tiny-base")) == text(base)

    asyncio.run(run())


def test_what_is_wrong_with_a_request_is_said(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["tiny"]) as server:
            unknown = await server.ask(PROMPT, model="gpt-9")
            assert (unknown.status_code, "gpt-9" in unknown.json()["error"]["message"]) == (404, True)
            long = await server.ask("many words " * 400)
            assert (long.status_code, long.json()["error"]["type"]) == (400, "exceed_context_size_error")
            for body in (b"[]", b"{", b'{"messages": 1}', b'{"messages": ' + b"[" * 990 + b"]" * 990 + b"}"):
                headers = {"Content-Type": "application/json"}
                reply = await server.client.post("/v1/chat/completions", content=body, headers=headers)
                assert reply.status_code == 400
                assert reply.json()["error"]["message"]
            assert (await server.client.post("/buleyean/swap", json={"path": "x"})).status_code == 400
            far = await server.client.post("/buleyean/swap", json={"run": "x" * 5000})
            assert (far.status_code, "too long" in far.json()["error"]["message"]) == (422, True)
            headers = {"Content-Type": "Application/JSON ; charset=utf-8"}
            for content, status in ((b'"cut \\ud83d"', 200), (b'"a", "temperature": NaN', 400)):
                raw = b'{"max_tokens": 2, "prompt": ' + content + b"}"
                reply = await server.client.post("/v1/completions", content=raw, headers=headers)
                assert reply.status_code == status, reply.text
            assert (await server.client.get("/health")).json() == {"status": "ok"}

    asyncio.run(run())


def test_who_may_not_come_in(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["tiny"], token="secret") as server:
            assert (await server.client.get("/v1/models")).status_code == 401
            assert (await server.ask(PROMPT)).status_code == 401
            assert (await server.client.get("/health")).status_code == 200
            server.client.headers["Authorization"] = "Bearer secret"
            assert (await server.ask(PROMPT)).status_code == 200
        async with served(targets["tiny"]) as server:
            post, json = server.client.post, {"messages": [], "rollback": True}
            for path in ("/v1/chat/completions", "/buleyean/swap"):
                assert (await post(path, json=json, headers={"Host": "evil.example"})).status_code == 421
                assert (await post(path, json=json, headers={"Origin": "http://evil.example"})).status_code == 403
                assert (await post(path, content=b"{}", headers={"Content-Type": "text/plain"})).status_code == 415

    asyncio.run(run())


def test_a_swap_changes_who_answers_and_a_rollback_changes_it_back(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["tiny"], gate=no_gate) as server:
            answers = [text(await server.ask(PROMPT))]
            for name in ("first", "second"):
                await server.serving.swap(targets[name])
                answers.append(text(await server.ask(PROMPT)))
            assert len(set(answers)) == 3
            for expected in answers[1::-1]:
                assert (await server.client.post("/buleyean/swap", json={"rollback": True})).status_code == 200
                assert text(await server.ask(PROMPT)) == expected
            nothing = await server.client.post("/buleyean/swap", json={"rollback": True})
            assert (nothing.status_code, "nothing was there" in nothing.text) == (400, True)

    asyncio.run(run())


def test_an_adapter_file_is_swapped_in_by_its_path(targets: Targets, tmp_path: Path) -> None:
    mild = tiny_target(tmp_path, "mild", lora_alpha=1)

    async def run() -> None:
        async with served(targets["tiny"]) as server:
            reply = await server.client.post("/buleyean/swap", json={"run": mild.adapter})
            assert reply.status_code == 200, reply.text
            assert reply.json()["gate"]["drift"] < 0.5
            assert (await server.ask(PROMPT)).headers["X-Buleyean-Run"] == "mild"
            (tmp_path / "damaged.gguf").write_bytes(Path(targets["first"].gguf).read_bytes()[:5000])
            for path in (tmp_path / "damaged.gguf", tmp_path / "none.gguf"):
                refused = await server.client.post("/buleyean/swap", json={"run": str(path)})
                assert (refused.status_code, path.name in refused.json()["error"]["message"]) == (422, True)
            assert (await server.ask(PROMPT)).headers["X-Buleyean-Run"] == "mild"

    asyncio.run(run())


def test_a_model_that_drifts_is_not_swapped_in(targets: Targets, tmp_path: Path) -> None:
    wild = tiny_target(tmp_path, "wild", lora_alpha=4000)

    async def run() -> None:
        async with served(targets["tiny"]) as server:
            before = text(await server.ask(PROMPT))
            with pytest.raises(EngineError, match="wild is not swapped in: it finds its base's answers less likely"):
                await server.serving.swap(replace(wild, gguf=targets["tiny"].gguf))
            assert text(await server.ask(PROMPT)) == before

    asyncio.run(run())


def test_one_swap_at_a_time(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["tiny"], gate=no_gate) as server:
            one = asyncio.ensure_future(server.serving.swap(targets["first"]))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="another swap"):
                await server.serving.swap(targets["second"])
            await one

    asyncio.run(run())


def test_an_engine_that_is_killed_comes_back(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["first"]) as server:
            before = text(await server.ask(PROMPT))
            os.kill(server.serving.choose(None).engine._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            statuses = set[int]()
            while (reply := await server.ask(PROMPT)).status_code != 200:
                statuses.add(reply.status_code)
                await asyncio.sleep(0.05)
            assert statuses <= {503}
            assert text(reply) == before
            assert len(server.started) == 2

    asyncio.run(run())


def test_an_engine_that_comes_back_after_a_swap_is_ended(targets: Targets) -> None:
    async def run() -> None:
        async with served(targets["first"], gate=no_gate) as server:
            start, late, is_swapped = server.serving._start, list[ServedEngine](), asyncio.Event()

            async def start_late(target: Target) -> ServedEngine:
                late.append(await start(target))
                await is_swapped.wait()
                return late[0]

            server.serving._start = start_late
            os.kill(server.serving.choose(None).engine._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            while not late:
                await asyncio.sleep(0.01)
            server.serving._start = start
            await server.serving.swap(targets["second"])
            is_swapped.set()
            assert await asyncio.wait_for(late[0].wait_ended(), 60) == 0
            assert (await server.ask(PROMPT)).headers["X-Buleyean-Run"] == "second"

    asyncio.run(run())


@pytest.mark.parametrize("swaps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_no_stream_fails_or_mixes_two_models_while_runs_are_swapped(targets: Targets, swaps: int) -> None:
    names = ["first", "second"]

    async def run() -> None:
        async with served(targets["second"], gate=no_gate) as server:
            expected = {"second": (await server.hear(PROMPT))[0]}
            await server.serving.swap(targets["first"])
            expected["first"] = (await server.hear(PROMPT))[0]
            assert expected["first"] != expected["second"]
            is_over, heard = False, list[str]()

            async def stream_on() -> None:
                while not is_over:
                    answer, name, events = await server.hear(PROMPT)
                    assert answer == expected[name]
                    assert events[-1]["choices"] == [] or events[-1]["choices"][0]["finish_reason"]
                    heard.append(name)

            clients = [asyncio.ensure_future(stream_on()) for _ in range(8)]
            for number in range(1, swaps + 1):
                await server.serving.swap(targets[names[number % 2]])
            is_over = True
            await asyncio.gather(*clients)
            assert {"first", "second"} == set(heard)
            assert len(heard) > 8

    asyncio.run(run())
