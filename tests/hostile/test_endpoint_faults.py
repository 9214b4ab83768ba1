"""An endpoint with every fault: mining ends with a line, loses no answer, hands out no key, and goes on when asked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buleyean_rl.inference import endpoint
from buleyean_rl.inference.endpoint_server import Patience
from hostile.attack import HANG_SECONDS, Outcome, assert_clear, run_command
from hostile.faulty_server import ELSEWHERE, FAULTS, FaultyServer, chosen_faults, faulty_server, send
from hostile.scale import runs

SEED = 7
PROMPTS = 20
KEY = "sk-secret-0123456789"
MAX_GROWTH = 200 << 20  # bytes of memory above the start
REFUSED = ("longer than the context", "content filter", "refused")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """What the command imports is no growth."""
    run_command("mine", "no such file")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(endpoint.API_KEY_VARIABLE, KEY)
    hasty = Patience(0.5, 0.0, retries=2, pause=0.01, max_pause=0.02, max_retry_after=1.0, last_answers=5.0)
    monkeypatch.setattr(endpoint, "DEFAULT_PATIENCE", hasty)
    Path("p.txt").write_text("".join(f"prompt {number}\n" for number in range(PROMPTS)))
    with faulty_server() as state:
        yield state


def mine(server: FaultyServer, *options: object) -> Outcome:
    words = ("mine", "p.txt", "--model", server.url, "--judge", "length:99-", "-o", "r.jsonl", "--json", *options)
    started, before = time.monotonic(), memory("VmRSS", reset=True)
    outcome = run_command(*map(str, words))
    assert time.monotonic() - started < HANG_SECONDS
    assert memory("VmHWM") - before < MAX_GROWTH
    return outcome


def memory(name: str, *, reset: bool = False) -> int:
    """Bytes of memory, now (VmRSS) or the most since the last reset (VmHWM)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def answers_on_disk() -> int:
    return Path("r.mined.jsonl").read_text().count('"answer"')


@pytest.mark.parametrize("times", [1, math.inf])
@pytest.mark.parametrize("name", chosen_faults(runs(len(FAULTS)), SEED))
def test_a_fault_costs_no_answer(server: FaultyServer, name: str, times: float) -> None:
    server.break_with(FAULTS[name], times=times)
    broken = mine(server)
    assert_clear(broken, (0, 1))
    assert answers_on_disk() >= 3
    server.break_with(None)
    mended = mine(server)
    assert mended.code == 0, mended.err
    report = json.loads(mended.out)
    assert report["answers_reused"] >= 3
    assert report["answers"] + sum(report["unanswered"].values()) == PROMPTS
    assert set(report["unanswered"]) <= set(REFUSED)
    rows = [json.loads(line) for line in Path("r.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) == report["answers"]
    right = [row["rejected_responses"] == [f"answer {row['prompt'].split()[-1]}"] for row in rows]
    assert right.count(False) <= min(times, PROMPTS - 3)  # an odd answer is an answer
    written = "".join((broken.out, broken.err, mended.err, *(path.read_text() for path in Path().glob("*.jsonl"))))
    assert KEY not in written
    assert ELSEWHERE not in written or "no redirect is followed" in written
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_huge_reply_within_its_bounds_is_no_huge_memory(server: FaultyServer) -> None:
    """The most that is ever read is 8 MB a request; of nothing but brackets it is parsed, eight at a time."""
    brackets = b'{"choices": [' + b"[]," * ((7 << 20) // 3) + b"[]]}"
    server.break_with(send(brackets))
    assert_clear(mine(server, "--max-tokens", 1_000_000), (0, 1))


def test_a_judge_gets_its_own_key_alone(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.JUDGE_KEY_VARIABLE, "judge-key")
    with faulty_server() as first, faulty_server() as second:
        words = ("--judge", f"llm:{first.url}", "--judge", f"llm:{second.url}")
        assert_clear(mine(server, *words))
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(first.keys) == {"Bearer judge-key"}
    assert set(second.keys) == {""}
