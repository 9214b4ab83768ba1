"""llama.cpp on one thread: its threads spin while they wait for each other, which costs seconds on a busy machine."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def one_llama_cpp_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
