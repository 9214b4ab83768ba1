"""Answers being written: those of conversations at once, each in a thread of its own; those of batches in between.

What is written is in the store every second, so that a server that was killed goes on where it was.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from buleyean_rl.errors import BuleyeanError
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.void.models import Models, ServedModel
from buleyean_rl.void.store import Row, Store
from buleyean_rl.void.store.conversations import UNFINISHED
from buleyean_rl.void.store.subject import messages_of

MAX_CONCURRENT = 4  # answers; more would slow all of them down
STORE_SECONDS = 1.0  # between writes of an answer under way
GROUP = 8  # answers of a batch that are computed together
IDLE_SECONDS = 0.2  # between looks for a batch


@dataclass
class PartialAnswer:
    """An answer as far as it is written.

    Args:
        text: so far.
        state: see `Conversations`.
        error: what failed and what to do.
        stop: set to end it with what it has.
    """

    text: str
    state: str = "waiting"
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


class _Ended(Exception):
    """A batch is paused, or the server ends."""


class Answering:
    """Writes answers.

    Args:
        store: where they go.
        models: who answers.
    """

    def __init__(self, store: Store, models: Models) -> None:
        self._store, self._models = store, models
        self._pool = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="answer")
        self._lock, self._partial, self._writing = threading.Lock(), dict[int, PartialAnswer](), 0
        self._closing, self._quiet = threading.Event(), threading.Event()
        self._quiet.set()
        self._background = threading.Thread(target=self._answer_batches, name="batches", daemon=True)

    def begin(self) -> None:
        """Go on with what an earlier server left, and with batches."""
        self.write(self._store.conversations.unfinished())
        self._background.start()

    def write(self, answers: Sequence[Row]) -> None:
        """Write answers that wait, from what there is of them.

        Args:
            answers: rows with the `max_tokens` of their turn.
        """
        with self._lock:
            for answer in answers:
                if answer["id"] not in self._partial and not self._closing.is_set():
                    partial = self._partial[answer["id"]] = PartialAnswer(answer["text"].rstrip("\ufffd"))
                    self._writing += 1
                    self._quiet.clear()
                    self._pool.submit(self._write, answer, partial)

    def partial(self, identity: int) -> PartialAnswer | None:
        """An answer under way, or one whose end the disk did not take; None of another."""
        with self._lock:
            return self._partial.get(identity)

    def stop(self, identity: int) -> None:
        """End an answer with what it has."""
        if (partial := self.partial(identity)) is not None:
            partial.stop.set()

    def close(self) -> None:
        """Stop writing; what is unfinished goes on with the next server."""
        self._closing.set()
        self._quiet.set()
        self._pool.shutdown(cancel_futures=True)
        if self._background.is_alive():
            self._background.join()

    def _write(self, answer: Row, partial: PartialAnswer) -> None:
        try:
            model = self._models.get(answer["model"])
            partial.state = "writing"
            whole = self._generate(answer, model, partial)
            if whole is None and self._closing.is_set():
                return
            # It is shown as written until the store has its end: whoever sees the end may act on it.
            state, drawn = _outcome(answer, model, whole)
            self._store.conversations.save(answer, partial.text, state, drawn=drawn)
        except OSError as error:
            partial.error = f"the answer cannot be stored: {error.strerror}: free some space, then ask again"
        except BuleyeanError as error:
            partial.error = str(error)
        except Exception as error:  # a page that waits must be told
            partial.error = f"the model failed: {error}"
        finally:
            is_stored = not partial.error or self._fail(answer, partial)
            with self._lock:
                if is_stored:
                    del self._partial[answer["id"]]
                self._writing -= 1
                if not self._writing:
                    self._quiet.set()

    def _generate(self, answer: Row, model: ServedModel, partial: PartialAnswer) -> Answer | None:
        """Write an answer; returns it whole, or None where it was ended."""
        begun: Sequence[int] = ()
        if partial.text:
            ids = json.loads(answer["drawn"] or "{}").get("token_ids")
            begun = model.engine.tokenize(partial.text, parse_special=False) if ids is None else ids
        stored_at = time.monotonic()
        sampling = Sampling(answer["max_tokens"], answer["temperature"], seed=answer["seed"] + len(begun))
        with closing(model.engine.generate(messages_of(answer["context"]), sampling, begun)) as pieces:
            while not (self._closing.is_set() or partial.stop.is_set()):
                try:
                    partial.text += next(pieces)
                except StopIteration as end:
                    whole: Answer = end.value
                    return whole if whole.text == partial.text else whole._replace(token_ids=None)
                if time.monotonic() > stored_at + STORE_SECONDS:
                    self._store.conversations.save(answer, partial.text, "writing")
                    stored_at = time.monotonic()
        if self._closing.is_set():
            self._store.conversations.save(answer, partial.text, "writing")
        return None

    def _fail(self, answer: Row, partial: PartialAnswer) -> bool:
        """Store that an answer failed; returns whether the disk took it."""
        try:
            self._store.conversations.save(answer, partial.text, "failed", error=partial.error)
        except OSError:  # it is written on when the server starts again
            return False
        finally:
            partial.state = "failed"
        return True

    def _answer_batches(self) -> None:
        while not self._closing.is_set():
            self._quiet.wait()
            group: list[Row] = []
            try:
                group = self._store.batches.waiting(GROUP)
                if group:
                    self._answer_group(group)
                else:
                    self._closing.wait(IDLE_SECONDS)
            except _Ended:
                continue
            except (OSError, sqlite3.Error):  # the disk is full, or the store busy
                self._closing.wait(10 * IDLE_SECONDS)
            except Exception as error:
                problem = str(error) if isinstance(error, BuleyeanError) else f"the model failed: {error}"
                for answer in group:
                    now = self._store.conversations.answer(answer["id"])
                    if now is not None and now["state"] in UNFINISHED:
                        self._fail(answer, PartialAnswer(answer["text"], error=problem))

    def _answer_group(self, group: list[Row]) -> None:
        """Write answers of one batch and one model, which wait while a conversation's are written."""
        model, first = self._models.get(group[0]["model"]), group[0]
        looked_at = time.monotonic()

        def wait_for_turn(_tokens: int) -> None:
            nonlocal looked_at
            self._quiet.wait()
            if time.monotonic() > looked_at + IDLE_SECONDS:
                looked_at = time.monotonic()
                if self._closing.is_set() or not self._store.batches.is_active(first["batch"]):
                    raise _Ended

        sampling = Sampling(first["max_tokens"], first["temperature"])
        conversations = [messages_of(answer["context"]) for answer in group]
        seeds = [answer["id"] for answer in group]
        with closing(model.engine.answers(conversations, sampling, seeds, wait_for_turn)) as outcomes:
            for index, outcome in outcomes:
                if not isinstance(outcome, Answer):
                    self._fail(group[index], PartialAnswer("", error=outcome.detail))
                    continue
                state, drawn = _outcome(group[index], model, outcome)
                self._store.conversations.save(group[index], outcome.text, state, drawn=drawn)


def _outcome(answer: Row, model: ServedModel, whole: Answer | None) -> tuple[str, Row]:
    """The state of an answer, and what a record says of it."""
    policy = {**model.drawn.get("policy", {}), "temperature": answer["temperature"]}
    drawn: Row = {**model.drawn, "policy": policy, "ended": whole is not None and whole.ended}
    if whole is None:
        return "stopped", drawn
    return ("done" if whole.ended else "cut"), drawn | {"token_ids": whole.token_ids}
