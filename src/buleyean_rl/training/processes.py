"""The processes that train together: which one this is, sums over all, what the first one computes for all.

    a launcher's processes --join--> Processes --deal--> each one's records --sum--> one gradient, one loss

Every process goes through the same run with the same state. A step's records are dealt among them, and their
gradients summed; what else there is to compute, the first computes `once`. So nothing wraps the model, and one process
is the same code. A collective waits as long as the others live, which is the heartbeat's to say.
"""

from __future__ import annotations

import atexit
import heapq
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from buleyean_rl.errors import BuleyeanError, ProcessError, UsageError
from buleyean_rl.system import launcher
from buleyean_rl.system.disk import full_disk
from buleyean_rl.system.host import available_cores
from buleyean_rl.training.heartbeat import BEAT_SECONDS, FAILURE, SILENT_BEATS, Heartbeat

T = TypeVar("T")
CONNECT_TIMEOUT = timedelta(minutes=10)  # for all processes to start
NEVER = timedelta(days=365)  # of a collective: a slow process is not a dead one
INTERRUPTED = 130  # the exit code of Ctrl-C
SHORT_WAIT, LONG_WAIT = 50e-6, 5e-3  # seconds between two looks at a collective


class Processes:
    """Those that train together, seen from one of them; all of them make the same calls in the same order.

    Args:
        rank: of this process, from 0.
        hosts: of each process.
        group: torch's group; None for one process, whose sums are its own.
        heartbeat: says who lives; None for one process.
    """

    def __init__(
        self, rank: int = 0, hosts: Sequence[str] = ("",), group: Any = None, heartbeat: Heartbeat | None = None
    ) -> None:
        self.rank, self.hosts, self.size = rank, list(hosts), len(hosts)
        self._group, self._heartbeat = group, heartbeat

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this is the first process of its host."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    @property
    def shard(self) -> list[Any]:
        """What names the caches that a host's processes share: those of several hosts may lie on one disk."""
        return [self.size, self.hosts[self.rank] if len(set(self.hosts)) > 1 else ""]

    def describe(self) -> dict[str, int]:
        """How many processes on how many hosts, for `run.json`."""
        return {"processes": self.size, "hosts": len(set(self.hosts))}

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; the same bytes in each. Shape: any."""
        if self._group is not None:
            self._wait(dist.all_reduce(values, group=self._group, async_op=True))
        return values

    def maximum(self, value: float) -> float:
        """The largest of all processes' values."""
        numbers = torch.tensor([value], dtype=torch.float64)
        if self._group is not None:
            self._wait(dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return float(numbers)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of one type the values that they have in the first process."""
        if self._group is None:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        self._broadcast(flat)
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def once(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all of them.

        Args:
            compute: returns what JSON can hold: no tuples.
        """
        if self._group is None:
            return compute()
        text = json.dumps(compute()).encode() if self.is_first else b""
        value: T = json.loads(self._share(text))
        return value

    def all(self, value: T) -> list[T]:
        """Each process's value, by rank; JSON can hold it."""
        if self._group is None:
            return [value]
        own = json.dumps(value).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.sum(sizes)
        texts, start = torch.zeros(int(sizes.sum()), dtype=torch.uint8), int(sizes[: self.rank].sum())
        texts[start : start + len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.sum(texts).split(sizes.tolist())]

    def barrier(self) -> None:
        """Wait for all."""
        self.sum(torch.zeros(1))

    @contextmanager
    def host_first(self) -> Iterator[None]:
        """Within, the first process of each host comes before the others, which find in its cache what it made."""
        if not self.is_first_on_host:
            self.barrier()
        yield
        if self.is_first_on_host:
            self.barrier()

    def receive(self, path: Path | None, folder: Path) -> Path | None:
        """A file or a folder of files of the first process, copied for the others, who may be on other hosts.

        Args:
            path: in the first process; ignored in the others.
            folder: of each other process, for its copy.

        Returns:
            `path`, or the copy; None if there is none.
        """
        if self._group is None:
            return path
        files = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.is_file()]
        is_folder = path is not None and path.is_dir()
        listed: list[Any] = self.once(
            lambda: [] if path is None else [path.name, is_folder, [file.name for file in files]]
        )
        if not listed:
            return None
        name, is_folder, names = listed
        copy = folder / name
        (copy if is_folder else folder).mkdir(parents=True, exist_ok=True)
        for i, file_name in enumerate(names):
            content = self._share(files[i].read_bytes() if self.is_first else b"")
            if not self.is_first:
                (copy / file_name if is_folder else copy).write_bytes(content)
        return path if self.is_first else copy

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Refuse values that differ among the processes.

        Args:
            what: they are, in words.
            values: JSON values by name.

        Raises:
            UsageError: which of them, and where.
        """
        for rank, others in enumerate(self.all(dict(values))):
            differing = [name for name in values if others.get(name) != values[name]]
            if differing and self.rank == 0:
                name = differing[0]
                raise UsageError(
                    f"the processes do not have the same {what}: {name} is {values[name]!r} in process 0 on "
                    f"{self.hosts[0]}, and {others.get(name)!r} in process {rank} on {self.hosts[rank]}"
                )

    def _share(self, content: bytes) -> bytes:
        """The first process's bytes."""
        size = torch.tensor([len(content)])
        self._broadcast(size)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_first and content:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if len(data):
            self._broadcast(data)
        return data.numpy().tobytes()

    def _broadcast(self, values: Tensor) -> None:
        self._wait(dist.broadcast(values, 0, group=self._group, async_op=True))

    def _wait(self, work: Any) -> None:
        """Wait for a collective as long as the others live.

        Raises:
            ProcessError: one does not, or has failed.
        """
        assert self._heartbeat is not None
        seconds, turns, looked = SHORT_WAIT, self._heartbeat.turns, 0.0
        while not work.is_completed():
            self._check()
            time.sleep(seconds)
            seconds = min(2 * seconds, LONG_WAIT)
            looked += seconds  # not a clock's: a machine may have slept
            if self._heartbeat.turns != turns:
                turns, looked = self._heartbeat.turns, 0.0
            elif looked > SILENT_BEATS * BEAT_SECONDS:
                self._end_for(self._heartbeat.lost(), must_tell=self.is_first_on_host)
        try:
            work.wait()
        except RuntimeError as error:  # a connection is closed: the heartbeat will know whose
            for _ in range(int(2 * SILENT_BEATS * BEAT_SECONDS / 0.1)):
                self._check()
                time.sleep(0.1)
            raise ProcessError(f"the processes cannot reach each other: {str(error).splitlines()[0]}") from error

    def _check(self) -> None:
        assert self._heartbeat is not None
        if self._heartbeat.failure is not None:
            self._end_for(self._heartbeat.failure, must_tell=self._heartbeat.must_tell)

    def _end_for(self, failure: Any, *, must_tell: bool) -> None:
        assert self._heartbeat is not None
        self._heartbeat.notice()
        raise ProcessError(str(failure), is_told=not must_tell)


ALONE = Processes()
_joined: list[Processes] = []  # the group that this process is in; torch has one of its own, too


def current() -> Processes:
    """The processes that this one has joined; alone if none."""
    return _joined[-1] if _joined else ALONE


@contextmanager
def join() -> Iterator[Processes]:
    """The processes that a launcher has started, connected while the context lasts; alone where it started none.

    Within, transformers and accelerate see one process.

    Raises:
        UsageError: what the launcher has set contradicts itself.
        ProcessError: the others cannot be reached.
    """
    launcher.check_whole_model()
    place = launcher.launched()
    if _joined or place is None:
        yield current()
        return
    processes, heartbeat = _connect(place)
    _joined.append(processes)
    try:
        with launcher.hidden():
            yield processes
            processes.barrier()  # or the last would miss the first, with whom the store ends
    except ProcessError:
        _exit_at_once(ProcessError.exit_code)
        heartbeat.linger()
        raise
    except BaseException as error:
        _exit_at_once(INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))
        failure = heartbeat.tell(_in_words(error), is_told=isinstance(error, Exception) or processes.is_first)
        heartbeat.linger()
        if failure.rank != place.rank and isinstance(error, Exception):
            raise ProcessError(str(failure), is_told=failure.told_on == processes.hosts[place.rank]) from error
        raise
    finally:
        heartbeat.leave()
        _joined.clear()


def deal(sizes: Sequence[int], hands: int, loads: Sequence[int] | None = None) -> list[list[int]]:
    """Deal items so that all have about as much: the longest first, each to whoever has least.

    Args:
        sizes: of the items.
        hands: how many they are dealt to.
        loads: what each has already; None for nothing.

    Returns:
        Each one's items as indices, in ascending order.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    heap = [(load, hand) for hand, load in enumerate(loads or [0] * hands)]
    heapq.heapify(heap)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, hand = heapq.heappop(heap)
        dealt[hand].append(i)
        heapq.heappush(heap, (load + sizes[i], hand))
    return [sorted(hand) for hand in dealt]


def _connect(place: launcher.Place) -> tuple[Processes, Heartbeat]:
    """Connect with the others: a store for the heartbeat, and torch's group, unless Ray has made it."""
    if place.address is None:
        raise UsageError(
            f"{place.size} processes were started, and nothing says where the first one is: set MASTER_ADDR to its host"
        )
    words = {
        "RANK": place.rank,
        "WORLD_SIZE": place.size,
        "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": place.address,
        "MASTER_PORT": place.port,
    }
    os.environ.update({name: str(value) for name, value in words.items()})  # for torch; `hidden` takes most away
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    try:
        store = _store()
        store.set(f"host {place.rank}", socket.gethostname())
        store.set(f"beat {place.rank}", "")
        if place.rank == 0:
            store.set(FAILURE, "")
        hosts = [store.get(f"host {rank}").decode() for rank in range(place.size)]
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=_store(), rank=place.rank, world_size=place.size, timeout=NEVER)
        group = dist.new_group(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=NEVER)
    except (RuntimeError, ValueError) as error:
        problem = str(error).splitlines()[0]
        where = f"{place.address}:{place.port}"
        raise ProcessError(
            f"process {place.rank} of {place.size} cannot join the others at {where}: {problem}"
        ) from error
    _share_cores(hosts.count(hosts[place.rank]))
    heartbeat = Heartbeat(store, place.rank, hosts)
    return Processes(place.rank, hosts, group, heartbeat), heartbeat


def _store() -> Any:
    """A connection to the launcher's store, or to that of the first process."""
    store = next(iter(rendezvous("env://", timeout=CONNECT_TIMEOUT)))[0]
    return dist.PrefixStore("buleyean", store)  # type: ignore[attr-defined]  # public, but for mypy


def _share_cores(processes: int) -> None:
    """Give each process of a host its part of the cores, unless somebody has."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, available_cores() // processes)))


def _exit_at_once(code: int) -> None:
    """End without torch's group, once the process is done: it would wait for what the others never send."""
    atexit.register(partial(_flush_and_exit, code))


def _flush_and_exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _in_words(error: BaseException) -> str:
    """Why a process ends, in a line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, BuleyeanError):
        return str(error)
    if (number := full_disk(error)) is not None:
        return f"a disk is full: {os.strerror(number)}"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
