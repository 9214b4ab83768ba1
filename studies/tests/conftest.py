"""Settings of the studies' tests, which run by themselves: `python -m pytest studies/tests`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported: a test that reaches out fails
os.environ["OMP_NUM_THREADS"] = "1"  # in models this small, threads only wait for each other
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "studies"), str(ROOT / "tests")]  # the studies, and the tiny model of the product's tests

import pytest
import torch

import harness
import own_loops
from buleyean_rl.data.records import RejectionRecord, make_record
from harness import Method
from tiny import tiny_llama, tiny_tokenizer

torch.cuda.is_available = lambda: False


def reject_all(prompts: list[str], answers: list[str]) -> list[RejectionRecord]:
    """Every answer rejected in all of 60 rounds."""
    return [make_record(prompt, [answer], [60], 60) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture
def tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a study of own loops, of two methods, on a model made on the spot."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(harness, "base", lambda *_: tiny_llama(tokenizer))
    monkeypatch.setattr(harness, "ANSWER_TOKENS", 30)
    monkeypatch.setattr(own_loops, "load_tokenizer", lambda _name: tokenizer)
    monkeypatch.setattr(own_loops, "METHODS", [Method("complement", 1e-3), Method("npo", 1e-3, seed=7)])
    monkeypatch.setattr(own_loops, "REFERENCE", "complement-lr0.001-seed42")
    monkeypatch.setattr(own_loops, "judge_loops", reject_all)
    monkeypatch.setattr(own_loops, "UNSEEN", 4)
    monkeypatch.setattr(own_loops, "NEUTRAL", 2)
    prompts, neutral = tmp_path / "prompts.txt", tmp_path / "neutral.jsonl"
    prompts.write_text("".join(f"Give me tip {n}.\n" for n in range(12)))
    neutral.write_text("".join(json.dumps({"text": f"The {n} cats sat on the mat."}) + "\n" for n in range(2)))
    files = ["--prompts", str(prompts), "--neutral", str(neutral)]
    return ["own_loops.py", *files, "--mined", "8", "-o", str(tmp_path / "study")]
