"""How long a run takes."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import LoadingClock, RunClock, Timing, Timings, plan_steps


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_more_rejections_want_more_steps() -> None:
    assert [plan_steps(n) for n in (0, 1, 16, 17, 100)] == [12, 12, 12, 13, 75]


def test_the_time_left_goes_from_what_was_expected_to_what_is_measured() -> None:
    clock = Clock()
    run = RunClock(10, Timing(start=4, step=1, end=6), now=clock)
    assert (run.phase, run.seconds_left()) == ("starting", 20)
    clock.now += 3
    assert run.seconds_left() == 17
    clock.now += 100  # it takes longer than expected
    assert run.seconds_left() == 1
    for step in (1, 2, 3):
        run.add(step)
        clock.now += 2
    assert (run.phase, run.seconds_left()) == ("training", 7 * 2 + 6 - 2)
    run.add(10)
    clock.now += 5
    assert (run.phase, run.seconds_left()) == ("checking", 1)


def test_a_run_that_goes_on_has_the_rest_before_it() -> None:
    clock = Clock()
    run = RunClock(10, Timing(start=4, step=1, end=6), done=7, now=clock)
    assert run.seconds_left() == 4 + 3 + 6
    for step in range(1, 8):  # told again
        run.add(step)
    assert run.phase == "starting"
    clock.now += 5
    run.add(8)
    assert (run.phase, run.seconds_left(), run.measured().start) == ("training", 2 + 6, 4)


def test_the_next_run_is_expected_to_take_as_long(tmp_path: Path) -> None:
    clock, store = Clock(), Store(tmp_path / "void.db")
    timings = Timings(store.settings, Timing.from_pass(0.05))
    assert timings.expected().seconds(12) == 30
    run = RunClock(3, timings.expected(), now=clock)
    assert run.measured() == timings.expected()  # nothing was heard of it
    clock.now += 7
    for step in (1, 2, 3):
        run.add(step)
        clock.now += 2
    timings.learn(run.measured())
    assert timings.expected() == Timing(start=5, step=2, end=2)
    store.close()


def test_loading_takes_as_long_as_the_last_time(tmp_path: Path) -> None:
    clock, store = Clock(), Store(tmp_path / "void.db")
    first = LoadingClock(store.settings, "mine", clock)
    assert first.left() == (None, None)
    clock.now += 8
    first.learn()
    again = LoadingClock(store.settings, "mine", clock)
    clock.now += 2
    assert again.left() == (0.25, 6)
    clock.now += 6
    assert again.left() == (None, None)  # it takes longer: nobody knows how long
    assert LoadingClock(store.settings, "another", clock).left() == (None, None)
    store.close()
