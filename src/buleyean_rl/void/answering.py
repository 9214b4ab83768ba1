"""Answers in the making: each goes on in its own thread, whether somebody watches or not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from buleyean_rl.errors import BuleyeanError
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.void.store import Row, Store

AT_ONCE = 4  # answers; more would only make all of them slow
MAX_TOKENS = 128


@dataclass
class Growing:
    """An answer as far as it is there."""

    text: str = ""
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class Voice:
    """A model that answers.

    Args:
        name: for people.
        engine: what runs it.
    """

    name: str
    engine: Engine


class Answering:
    """The two voices, and what they are saying.

    Args:
        store: where answers go when they are whole.
        base: the model nobody trained.
    """

    def __init__(self, store: Store, base: Voice) -> None:
        self._store, self._pool = store, ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answer")
        self._lock = threading.Lock()
        self._growing: dict[tuple[str, int], Growing] = {}
        self._stopping = threading.Event()
        self.voices = {"base": base}

    def hear(self, question: Row) -> list[Growing]:
        """A question's answers, begun if nobody has: also those that a restart interrupted."""
        with self._lock:
            heard = []
            for answer in question["answers"]:
                key = question["id"], answer["slot"]
                if answer["text"] is not None and key not in self._growing:
                    heard.append(Growing(answer["text"], done=True))
                    continue
                if key not in self._growing:
                    self._growing[key] = Growing()
                    voice = self.voices.get(answer["side"], self.voices["base"])
                    self._pool.submit(self._answer, key, question["prompt"], voice, self._growing[key])
                heard.append(self._growing[key])
            return heard

    def close(self) -> None:
        """Stop talking."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def _answer(self, key: tuple[str, int], prompt: str, voice: Voice, growing: Growing) -> None:
        try:
            messages = [{"role": "user", "content": prompt}]
            with closing(voice.engine.generate(messages, Sampling(max_tokens=MAX_TOKENS))) as pieces:
                for piece in pieces:
                    if self._stopping.is_set():
                        return
                    growing.text += piece
            self._store.finish_answer(*key, growing.text)
            with self._lock:
                self._growing.pop(key, None)
        except BuleyeanError as error:
            growing.error = str(error)
        except Exception as error:  # whoever listens must not wait for ever
            growing.error = f"the model failed: {error}"
        finally:
            growing.done = True
