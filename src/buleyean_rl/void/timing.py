"""How long a run takes: told before it, from an earlier one, and while it runs, from its own steps; and loading.

start: load, measure     steps     end: measure, ask again
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from buleyean_rl.void.store import Settings

TIMING, LOADING = "timing", "loading"  # the settings
MIN_STEPS, STEPS_PER_REJECTION = 12, 0.75
# Relative to a step, as measured with the bundled model; a step itself relative to a forward pass of 64 tokens.
START_STEPS, END_STEPS, STEP_PASSES = 6.0, 12.0, 20.0


@dataclass(frozen=True)
class Timing:
    """What the parts of a run take.

    Args:
        start: seconds before the first step.
        step: seconds.
        end: seconds after the last step.
    """

    start: float
    step: float
    end: float

    @classmethod
    def from_pass(cls, seconds: float) -> Timing:
        """A guess, from the seconds of a forward pass of 64 tokens."""
        step = seconds * STEP_PASSES
        return cls(START_STEPS * step, step, END_STEPS * step)

    def seconds(self, steps: int) -> int:
        """Of a run."""
        return math.ceil(self.start + steps * self.step + self.end)


def plan_steps(rejections: int) -> int:
    """As many steps as so many rejections want."""
    return max(MIN_STEPS, math.ceil(STEPS_PER_REJECTION * rejections))


class RunClock:
    """The time of the run under way.

    Args:
        steps: in all.
        expected: what its parts will take.
        done: steps of an earlier process.
        now: a clock, in seconds.
    """

    def __init__(self, steps: int, expected: Timing, done: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._expected, self._done, self._now = steps, expected, done, now
        self._began = now()
        self._points: list[tuple[int, float]] = []  # the first step that was heard of, and the last

    def add(self, step: int) -> None:
        """Note a step; one of an earlier process tells nothing."""
        if step > self._done:
            self._points = [*self._points[:1], (step, self._now())]

    @property
    def phase(self) -> str:
        """Starting, training or checking."""
        if not self._points:
            return "starting"
        return "checking" if self._points[-1][0] >= self._steps else "training"

    def seconds_left(self) -> int:
        """Until the model can be used; at least one."""
        if not self._points:
            left = self._expected.seconds(self._steps - self._done) - (self._now() - self._began)
        else:
            step, since = self._points[-1][0], self._now() - self._points[-1][1]
            left = (self._steps - step) * self._step_seconds() + self._expected.end - since
        return max(1, math.ceil(left))

    def measured(self) -> Timing:
        """What the parts took, at the end."""
        if not self._points:
            return self._expected
        step = self._step_seconds()
        start = self._points[0][1] - self._began - (self._points[0][0] - self._done) * step
        return Timing(max(0.0, start), step, self._now() - self._points[-1][1])

    def _step_seconds(self) -> float:
        if len(self._points) < 2:
            return self._expected.step
        (first, begin), (last, end) = self._points
        return (end - begin) / max(1, last - first)


class Timings:
    """What runs are expected to take: as the last one did.

    Args:
        settings: where the last one is.
        guess: of a run before any.
    """

    def __init__(self, settings: Settings, guess: Timing) -> None:
        self._settings, self._guess = settings, guess

    def expected(self) -> Timing:
        """Of the next run."""
        stored = self._settings.get(TIMING)
        return self._guess if stored is None else Timing(**stored)

    def learn(self, timing: Timing) -> None:
        """Note what a run took."""
        self._settings.set(TIMING, asdict(timing))


class LoadingClock:
    """How far a model is loaded, if that takes as long as the last time.

    Args:
        settings: where the last time is.
        model: its name.
        now: a clock, in seconds.
    """

    def __init__(self, settings: Settings, model: str, now: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._model, self._now, self._began = settings, model, now, now()
        self._expected: float | None = (settings.get(LOADING) or {}).get(model)

    def left(self) -> tuple[float | None, int | None]:
        """The share that is loaded, and the seconds left; None where nobody knows: it takes longer than expected."""
        passed = self._now() - self._began
        if self._expected is None or passed >= self._expected:
            return None, None
        return passed / self._expected, math.ceil(self._expected - passed)

    def learn(self) -> None:
        """Note that the model is loaded."""
        self._settings.set(LOADING, {self._model: self._now() - self._began})
