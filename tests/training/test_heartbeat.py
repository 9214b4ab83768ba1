"""Who lives, and why a run of several processes ends; the store is a dictionary, and every turn is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from buleyean_rl.training.heartbeat import FAILURE, SILENT_BEATS, Failure, Heartbeat

HOSTS = ["a", "a", "b", "b"]


class Store:
    """torch's, as far as it is used."""

    def __init__(self) -> None:
        self.values = {FAILURE: b""} | {f"beat {rank}": b"" for rank in range(len(HOSTS))}

    def set_timeout(self, _: Any) -> None: ...

    def set(self, name: str, value: str) -> None:
        self.values[name] = value.encode()

    def multi_get(self, names: list[str]) -> list[bytes]:
        return [self.values[name] for name in names]

    def compare_set(self, name: str, expected: str, value: str) -> bytes:
        if self.values[name] == expected.encode():
            self.values[name] = value.encode()
        return self.values[name]


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[Heartbeat]:
    monkeypatch.setattr(Heartbeat, "_run", lambda _: None)  # no thread
    store = Store()
    return [Heartbeat(store, rank, HOSTS) for rank in range(len(HOSTS))]


def turn(beats: list[Heartbeat], *silent: int) -> None:
    for rank, beat in enumerate(beats):
        if rank not in silent and beat.failure is None:
            beat._turn()


def test_nobody_is_given_up_while_all_beat(beats: list[Heartbeat]) -> None:
    for _ in range(3 * SILENT_BEATS):
        turn(beats)
    assert [beat.failure for beat in beats] == [None] * 4


@pytest.mark.parametrize("silent", [0, 1, 3])
def test_who_is_silent_is_named_by_all(beats: list[Heartbeat], silent: int) -> None:
    for _ in range(SILENT_BEATS + 3):
        turn(beats, silent)
    failures = [beat.failure for rank, beat in enumerate(beats) if rank != silent]
    assert {failure and failure.rank for failure in failures} == {silent}
    assert str(failures[0]) == f"process {silent} on {HOSTS[silent]}: it does not answer any more; go on with --resume"
    # one on each host says so
    assert [rank for rank, beat in enumerate(beats) if rank != silent and beat.must_tell] == [int(silent == 0), 2]


def test_a_machine_that_slept_gives_nobody_up(beats: list[Heartbeat]) -> None:
    """What counts is how often it looked, however long that took."""
    for _ in range(SILENT_BEATS - 2):
        turn(beats, 1)
    turn(beats)
    for _ in range(SILENT_BEATS - 2):
        turn(beats, 1)
    assert all(beat.failure is None for beat in beats)


def test_the_first_failure_is_everybodys(beats: list[Heartbeat]) -> None:
    for rank in (2, 1):
        beats[rank]._own = Failure(rank, HOSTS[rank], f"disk {rank} is full", HOSTS[rank])
    turn(beats, 0, 1, 3)
    turn(beats)
    assert {beat.failure for beat in beats} == {Failure(2, "b", "disk 2 is full", "b")}
    # it is printed where it happened, by the process itself; on the other host by the first
    assert [beat.must_tell for beat in beats] == [True, False, False, False]
