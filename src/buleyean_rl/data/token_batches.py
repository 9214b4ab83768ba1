"""Records to columns of token ids: the first ones in this process, many more in as many others as there are cores.

    records --256 at a time--> Encoder, build_boundaries --> TokenBatch, in the order of the records

A process of ours is started with `python -m` and fed through pipes: it shares no threads with this one, works in
whatever program the package is used, and imports from where this one does: not from the folder somebody is in.
"""

from __future__ import annotations

import pickle  # between processes of one program: nothing that anybody else wrote
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.trie import Boundary, Judgement, build_boundaries
from buleyean_rl.system.host import available_cores
from buleyean_rl.system.module_process import module_command, module_environment, take_stdout

LOCAL_BATCHES = 64  # encoded here first: for fewer, starting other processes takes longer than it saves
BATCH_COUNTS = ("read", "dropped", "truncated_responses")
_IDS = pa.list_(pa.int32())
JUDGEMENTS = [f"judgement_{name}" for name in Judgement._fields]
# The sizes repeat what the lists say, so that they can be read without touching the lists.
SIZES = [pa.field(name, pa.int32()) for name in ("size", "nodes", "rejected_answers", "accepted_answers")]
SCHEMA = pa.schema(
    [
        *SIZES,
        *(pa.field(name, _IDS) for name in ("prompt", "tokens", "runs", "parents")),
        *(pa.field(name, _IDS) for name in JUDGEMENTS[:2]),
        *(pa.field(name, pa.list_(pa.int64())) for name in JUDGEMENTS[2:]),
        pa.field("ends", _IDS),
        *(pa.field(name, pa.list_(pa.int64())) for name in ("counts", "rounds")),
        pa.field("truncated", pa.int32()),
    ],
)


@dataclass(frozen=True)
class Encoding:
    """How records are tokenised.

    Args:
        tokenizer: of the base model.
        max_length: tokens of prompt and response together; what is longer is cut.
        max_rejected: see `build_boundaries`.
        skip_refused: drop records that the chat template refuses instead of raising.
    """

    tokenizer: Any
    max_length: int
    max_rejected: int | None
    skip_refused: bool


@dataclass(frozen=True)
class TokenBatch:
    """Some records in tokens.

    Args:
        columns: a row for each that was not dropped, by `SCHEMA`.
        counts: of records read and dropped, of responses cut, and what the encoder counted.
    """

    columns: pa.RecordBatch
    counts: Counter[str]


def pack(boundaries: Sequence[Boundary | None]) -> TokenBatch:
    """Boundaries as columns; None stands for a record that was dropped."""
    usable = [boundary for boundary in boundaries if boundary is not None]
    truncated = sum(boundary.truncated for boundary in usable)
    counts = dict(zip(BATCH_COUNTS, (len(boundaries), len(boundaries) - len(usable), truncated), strict=True))
    return TokenBatch(_to_columns(usable), Counter(counts))


def encode_all(records: Iterable[RejectionRecord], encoding: Encoding, batch_records: int) -> Iterator[TokenBatch]:
    """Records in tokens, in their order, by all cores where they are many.

    Args:
        records: streamed once, a few batches ahead of what is taken.
        encoding: how.
        batch_records: in a batch.

    Raises:
        TemplateRefusal: of the first record that the chat template refuses.
    """
    stream = iter(records)
    batches = iter(lambda: list(islice(stream, batch_records)), [])
    encode = _make_encode(encoding)
    yield from map(encode, islice(batches, LOCAL_BATCHES))
    if (processes := available_cores()) > 1 and (first := next(batches, None)) is not None:
        yield from _encode_elsewhere(first, batches, encoding, processes)
    else:
        yield from map(encode, batches)


def _make_encode(encoding: Encoding) -> Any:
    encoder = Encoder(encoding.tokenizer, encoding.max_length, skip_refused=encoding.skip_refused)

    def encode(records: Sequence[RejectionRecord]) -> TokenBatch:
        encoder.counts.clear()
        batch = pack(build_boundaries(records, encoder, encoding.max_rejected))
        batch.counts.update(encoder.counts)
        return batch

    return encode


def _encode_elsewhere(
    first: Sequence[RejectionRecord], batches: Iterator[Sequence[RejectionRecord]], encoding: Encoding, processes: int
) -> Iterator[TokenBatch]:
    """Batches, encoded in other processes."""
    free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    workers = [_Process(encoding) for _ in range(processes)]
    for worker in workers:
        free.put(worker)

    def encode(records: Sequence[RejectionRecord]) -> TokenBatch:
        worker = free.get()
        try:
            return worker.encode(records)
        finally:
            free.put(worker)

    under_way: deque[Future[TokenBatch]] = deque()
    with ThreadPoolExecutor(processes) as threads:
        try:
            under_way.append(threads.submit(encode, first))
            for batch in batches:
                under_way.append(threads.submit(encode, batch))
                if len(under_way) > 2 * processes:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
            for worker in workers:
                worker.close()


class _Process:
    """Another process that encodes batches, one at a time."""

    def __init__(self, encoding: Encoding) -> None:
        environment = module_environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
        self._process = subprocess.Popen(
            module_command(__name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._encoding: Encoding | None = encoding  # is sent from the thread that comes first

    def encode(self, records: Sequence[RejectionRecord]) -> TokenBatch:
        """A batch.

        Raises:
            RecordError: as `encode_all`.
            ChildProcessError: the process has ended, as when memory runs out.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._encoding is not None:
                pickle.dump(self._encoding, self._process.stdin)
                self._encoding = None
            pickle.dump(records, self._process.stdin)
            self._process.stdin.flush()
            result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise ChildProcessError(
                f"a process that tokenises has ended with status {self._process.wait()}: is memory scarce?"
            ) from None
        if isinstance(result, BaseException):
            raise result
        return TokenBatch(*result)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()


def _serve() -> None:
    """Encode batches from stdin to stdout until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end closes the pipe
    requests, replies = sys.stdin.buffer, take_stdout("wb")
    with suppress(EOFError, BrokenPipeError):
        encode = _make_encode(pickle.load(requests))
        while True:
            records = pickle.load(requests)
            try:
                batch = encode(records)
                result: Any = batch.columns, batch.counts
            except Exception as error:
                result = error
            pickle.dump(result, replies)
            replies.flush()


def _to_columns(boundaries: Sequence[Boundary]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        name: [[judgement[i] for judgement in boundary.judgements] for boundary in boundaries]
        for i, name in enumerate(JUDGEMENTS)
    }
    attributes = [field.name for field in SCHEMA if field.name not in columns]
    columns |= {name: [getattr(boundary, name) for boundary in boundaries] for name in attributes}
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


if __name__ == "__main__":
    _serve()
