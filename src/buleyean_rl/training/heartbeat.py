"""Whether the processes of a run live: each says so every second, and one that does not is given up.

    every process --a number that grows--> store --> the first process sees who is silent
                                             |
                  why the run ends <---------+-----> every process sees that, and that the first one lives

The store is torch's key-value server, beside the first process or in torchrun. What counts is how often it was looked,
not how long: a machine that slept does not give up the others, nor they it. A process that computes for an hour beats
all the while.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

BEAT_SECONDS = 1.0
SILENT_BEATS = 12  # without a new number, after which a process is given up
GRACE_SECONDS = 6.0  # until a process that has not noticed the end of the run by itself is ended
STORE_TIMEOUT = timedelta(seconds=10)
FAILURE = "failure"


class Failure(NamedTuple):
    """Why a run of several processes ends.

    Args:
        rank: of the process that failed.
        host: its host.
        problem: in words.
        told_on: the host where it was printed already; empty if it was not.
    """

    rank: int
    host: str
    problem: str
    told_on: str = ""

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}: {self.problem}"


class Heartbeat:
    """Says that this process lives, and watches the others, in a thread of its own.

    Args:
        store: of torch, which this object alone uses.
        rank: of this process.
        hosts: of each process.
    """

    def __init__(self, store: Any, rank: int, hosts: list[str]) -> None:
        self._store, self._rank, self._hosts = store, rank, hosts
        self._watched = [other for other in range(len(hosts)) if other != rank] if rank == 0 else [0]
        self._turns, self._last = 0, dict.fromkeys(self._watched, ("", 0))
        self._own: Failure | None = None
        self._left, self._noticed = threading.Event(), threading.Event()
        self.failure: Failure | None = None
        store.set_timeout(STORE_TIMEOUT)
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @property
    def turns(self) -> int:
        """How often the others were looked at; it stands still where the store does not answer."""
        return self._turns

    @property
    def must_tell(self) -> bool:
        """Whether it is this process that prints the failure: the first that lives on a host where nobody did."""
        failure = self.failure
        if failure is None or failure.told_on == self._hosts[self._rank]:
            return False
        living = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        return self._rank == min((rank for rank in living if rank != failure.rank), default=self._rank)

    def notice(self) -> None:
        """The process ends by itself."""
        self._noticed.set()

    def tell(self, problem: str, is_told: bool = True) -> Failure:
        """Tell the others that this process failed; returns what the run ends for.

        Args:
            problem: in words.
            is_told: whether this process prints why itself.
        """
        self.notice()
        host = self._hosts[self._rank]
        self._own = Failure(self._rank, host, problem, host if is_told else "")
        for _ in range(int(3 * BEAT_SECONDS / 0.05)):
            if self.failure is not None:
                break
            time.sleep(0.05)
        return self.failure or self._own

    def linger(self) -> None:
        """Let the others read why the run ends, where the store may end with this process."""
        if self._rank == 0:
            time.sleep(3 * BEAT_SECONDS)

    def leave(self) -> None:
        """Beat no more: the run is over."""
        self._left.set()

    def lost(self) -> Failure:
        """The failure of a process whose store does not answer any more."""
        return Failure(0, self._hosts[0], "it cannot be reached any more; go on with --resume")

    def _beat(self) -> None:
        self._store.set(f"beat {self._rank}", str(self._turns))

    def _run(self) -> None:
        silent = 0
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._turn()
                silent = 0
            except Exception:  # torch's errors of a store have no class in common
                silent += 1
                if silent * BEAT_SECONDS >= SILENT_BEATS / 2:
                    self.failure = self.lost()
            if self.failure is not None:
                self._end()
                return

    def _turn(self) -> None:
        """Beat, and look at the others."""
        if self._own is not None:
            self._publish(self._own)
        self._turns += 1
        self._beat()
        text, *beats = self._store.multi_get([FAILURE, *(f"beat {rank}" for rank in self._watched)])
        if text:
            self.failure = Failure(*json.loads(text))
            return
        for rank, beat in zip(self._watched, beats, strict=True):
            number, since = self._last[rank]
            if beat != number:
                self._last[rank] = (beat, self._turns)
            elif self._turns - since >= SILENT_BEATS:
                problem = "it does not answer any more; go on with --resume"
                self._publish(Failure(rank, self._hosts[rank], problem))

    def _publish(self, failure: Failure) -> None:
        """The first failure is everybody's."""
        self.failure = Failure(*json.loads(self._store.compare_set(FAILURE, "", json.dumps(failure))))

    def _end(self) -> None:
        """End a process that computes on, or waits in foreign code, for a run that is over."""
        if self._noticed.wait(GRACE_SECONDS):
            return
        if self.must_tell:
            with suppress(OSError):
                print(f"error: {self.failure}", file=sys.stderr, flush=True)
        os._exit(1)
