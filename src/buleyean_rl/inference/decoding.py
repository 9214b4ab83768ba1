"""Continuous batching: tokens of many sequences in every step, a finished one's place taken at once by the next.

    waiting --room in rows, places and blocks--> running --a token drawn in every step--> ended
                                                 |   ^
        prompts are computed beside, some rows a step   `-- out of blocks: the last one waits again, its tokens kept

A sequence's tokens do not depend on the others: neither on what is computed beside it, nor on when.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.block_cache import BlockCache
from buleyean_rl.kernels.decode import CACHE_BLOCK, Draws
from buleyean_rl.models.cached_decoder import CachedDecoder

MAX_ROWS = 256  # of a step: more make it no faster


class Request(NamedTuple):
    """A prompt to continue.

    Args:
        ids: of the prompt, one at least.
        max_tokens: drawn at most.
        temperature: 0 is greedy.
        top_p: probability of the nucleus, before the temperature.
        seed: of what is drawn.
        is_stopped: whether the tokens drawn so far, which are not empty, end the sequence; None for never.
    """

    ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    is_stopped: Callable[[Sequence[int]], bool] | None = None


class Drawn(NamedTuple):
    """A token of a sequence.

    Args:
        request: its index.
        token: its id, which may be an end token.
        logprob: at temperature 1, in nats.
        is_last: whether the sequence has ended.
    """

    request: int
    token: int
    logprob: float
    is_last: bool


@dataclass
class _Sequence:
    index: int
    request: Request
    ids: list[int]
    uniform: list[float]  # what decides about each token that is drawn
    computed: int = 0  # tokens whose keys and values are cached
    blocks: list[int] = field(default_factory=list)
    prefix: int = 0  # of the last full block
    place: int = -1  # row of the table of blocks


class BatchDecoder:
    """Continues prompts. Several threads may call it: their steps take turns.

    Args:
        decoder: of a model.
        end_tokens: that end a sequence.
        context: maximum tokens of a sequence.
        cache_bytes: of keys and values of all sequences; a whole context has room in any case.
        parallel: sequences at once.
    """

    def __init__(
        self, decoder: CachedDecoder, *, end_tokens: set[int], context: int, cache_bytes: int, parallel: int
    ) -> None:
        self._decoder, self._end_tokens, self._parallel = decoder, end_tokens, parallel
        self._blocks_per_sequence = -(-context // CACHE_BLOCK)
        capacity = max(self._blocks_per_sequence + 1, cache_bytes // (2 * decoder.decoder.block_numbers))
        self._cache = BlockCache(decoder.decoder.block_numbers, capacity)
        self._lock = threading.Lock()

    def run(self, requests: Sequence[Request]) -> Generator[Drawn]:
        """The tokens as they are drawn; closing the generator stops the computation.

        Raises:
            EngineError: the model's logits are not numbers.
            MemoryError: there is not enough.
        """
        with self._lock:
            if self._decoder.refresh():
                self._cache.clear()
        batch = _Batch(self._decoder, self._cache, self._end_tokens, self._parallel, self._blocks_per_sequence)
        batch.waiting.extend(_as_sequence(index, request) for index, request in enumerate(requests))
        try:
            while batch.waiting or batch.running:
                with self._lock:
                    drawn = batch.step()
                yield from drawn
        finally:
            with self._lock:
                batch.release()


def _as_sequence(index: int, request: Request) -> _Sequence:
    uniform = [0.0] * request.max_tokens
    if request.temperature > 0:
        uniform = torch.rand(request.max_tokens, generator=torch.Generator().manual_seed(request.seed)).tolist()
    return _Sequence(index, request, list(request.ids), uniform)


class _Batch:
    """Sequences that wait and run."""

    def __init__(
        self, decoder: CachedDecoder, cache: BlockCache, end_tokens: set[int], parallel: int, blocks: int
    ) -> None:
        self._decoder, self._cache, self._end_tokens = decoder, cache, end_tokens
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []
        self._places = list(range(parallel))
        self._table = torch.zeros(parallel, blocks, dtype=torch.long)
        self._addresses = self._table.numpy()  # the same memory

    def step(self) -> list[Drawn]:
        """Compute rows of the running sequences and of as many waiting ones as there is room for."""
        planned = self._plan()
        tokens: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        drawing: list[tuple[_Sequence, int]] = []
        for sequence, count in planned:
            start = sequence.computed
            tokens += sequence.ids[start : start + count]
            positions += range(start, start + count)
            places += [sequence.place] * count
            sequence.computed += count
            if sequence.computed == len(sequence.ids):
                drawing.append((sequence, len(tokens) - 1))
        drawn, logprobs = self._decoder.step(tokens, places, positions, self._table, _draws(drawing))
        results = []
        for (sequence, _), token, logprob in zip(drawing, drawn, logprobs, strict=True):
            if logprob != logprob:
                raise EngineError("the model's logits are not numbers: its weights are damaged, or too large for bf16")
            sequence.ids.append(token)
            is_last = self._is_last(sequence, token)
            if is_last:
                self._stop(sequence)
            results.append(Drawn(sequence.index, token, logprob, is_last))
        return results

    def release(self) -> None:
        """Give the blocks of all running sequences back."""
        for sequence in self.running[::-1]:
            self._stop(sequence)

    def _plan(self) -> list[tuple[_Sequence, int]]:
        """The sequences of a step and how many rows each has: the running ones first, then those that can begin."""
        planned, rows = [], MAX_ROWS
        for sequence in list(self.running):
            if sequence.place < 0:
                continue  # it had to make room
            count = min(len(sequence.ids) - sequence.computed, rows)
            if count and self._make_room(sequence, count):
                planned.append((sequence, count))
                rows -= count
        while self.waiting and self._places and rows:
            sequence = self.waiting[0]
            sequence.blocks, sequence.prefix = self._cache.share(sequence.ids)
            sequence.computed = CACHE_BLOCK * len(sequence.blocks)
            needed = -(-(len(sequence.ids) + 1) // CACHE_BLOCK) - len(sequence.blocks)
            if self.running and self._cache.free < needed + len(self.running):
                self._cache.release(sequence.blocks)
                break
            self.running.append(self.waiting.popleft())
            sequence.place = self._places.pop()
            for i, block in enumerate(sequence.blocks):
                self._addresses[sequence.place, i] = self._cache.address(block)
            count = min(len(sequence.ids) - sequence.computed, rows)
            self._extend(sequence, count)
            planned.append((sequence, count))
            rows -= count
        return planned

    def _make_room(self, sequence: _Sequence, count: int) -> bool:
        """Blocks for some more rows of a running sequence; whether it still runs, and need not wait for others."""
        needed = -(-(sequence.computed + count) // CACHE_BLOCK) - len(sequence.blocks)
        while needed > self._cache.free and len(self.running) > 1:
            last = self.running[-1]
            self._stop(last)
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        self._extend(sequence, count)
        return True

    def _extend(self, sequence: _Sequence, count: int) -> None:
        """Allocate blocks for some more rows, and note what those hold that they fill."""
        end = sequence.computed + count
        for i in range(len(sequence.blocks), -(-end // CACHE_BLOCK)):
            sequence.blocks.append(self._cache.allocate())
            self._addresses[sequence.place, i] = self._cache.address(sequence.blocks[i])
        for i in range(sequence.computed // CACHE_BLOCK, end // CACHE_BLOCK):
            held = sequence.ids[i * CACHE_BLOCK : (i + 1) * CACHE_BLOCK]
            sequence.prefix = self._cache.hold(sequence.blocks[i], sequence.prefix, held)

    def _is_last(self, sequence: _Sequence, token: int) -> bool:
        request = sequence.request
        drawn = sequence.ids[len(request.ids) :]
        is_stopped = request.is_stopped is not None and request.is_stopped(drawn)
        return token in self._end_tokens or len(drawn) == request.max_tokens or is_stopped

    def _stop(self, sequence: _Sequence) -> None:
        """Give a running sequence's blocks and place back."""
        self.running.remove(sequence)
        self._cache.release(sequence.blocks)
        self._places.append(sequence.place)
        sequence.blocks, sequence.prefix, sequence.computed, sequence.place = [], 0, 0, -1


def _draws(drawing: Sequence[tuple[_Sequence, int]]) -> Draws:
    requests = [sequence.request for sequence, _ in drawing]
    uniform = [sequence.uniform[len(sequence.ids) - len(sequence.request.ids)] for sequence, _ in drawing]
    numbers = torch.tensor(
        [[request.temperature for request in requests], [request.top_p for request in requests], uniform],
        dtype=torch.float32,
    )
    return Draws(torch.tensor([row for _, row in drawing], dtype=torch.long), *numbers)
