"""Answers being generated, each in a thread of its own, whether somebody watches or not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from buleyean_rl.errors import BuleyeanError
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.void.store import Row, Store

MAX_CONCURRENT = 4  # answers; more would slow all of them down
MAX_TOKENS = 128


@dataclass
class PartialAnswer:
    """An answer as far as it is generated."""

    text: str = ""
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class ServedModel:
    """A model that answers.

    Args:
        name: for people.
        engine: what runs it.
    """

    name: str
    engine: Engine


class Answering:
    """The models that answer, and their answers under way.

    Args:
        store: where answers go when they are whole.
        base: the base model.
    """

    def __init__(self, store: Store, base: ServedModel) -> None:
        self._store, self._pool = store, ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="answer")
        self._lock = threading.Lock()
        self._partial: dict[tuple[str, int], PartialAnswer] = {}
        self._stopping = threading.Event()
        self.models = {"base": base}

    def answers_to(self, question: Row) -> list[PartialAnswer]:
        """The answers to a question; those that were not begun, or that a restart interrupted, are begun."""
        with self._lock:
            answers = []
            for row in question["answers"]:
                key = question["id"], row["slot"]
                if row["text"] is not None and key not in self._partial:
                    answers.append(PartialAnswer(row["text"], done=True))
                    continue
                if key not in self._partial:
                    self._partial[key] = PartialAnswer()
                    model = self.models.get(row["side"], self.models["base"])
                    self._pool.submit(self._answer, key, question["prompt"], model, self._partial[key])
                answers.append(self._partial[key])
            return answers

    def close(self) -> None:
        """Stop generating."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def _answer(self, key: tuple[str, int], prompt: str, model: ServedModel, answer: PartialAnswer) -> None:
        try:
            messages = [{"role": "user", "content": prompt}]
            with closing(model.engine.generate(messages, Sampling(max_tokens=MAX_TOKENS))) as pieces:
                for piece in pieces:
                    if self._stopping.is_set():
                        return
                    answer.text += piece
            self._store.questions.finish_answer(*key, answer.text)
        except BuleyeanError as error:
            answer.error = str(error)
        except OSError as error:
            answer.error = f"the answer cannot be stored: {error.strerror}: free some space, then ask again"
        except Exception as error:  # a page that waits must be told
            answer.error = f"the model failed: {error}"
        finally:
            with self._lock:  # what has failed is begun anew when it is asked for again
                self._partial.pop(key, None)
            answer.done = True
