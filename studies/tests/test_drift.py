"""The study of loops against drift, from end to end on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import drift
from buleyean_rl.data.records import RejectionRecord, make_record
from buleyean_rl.inference.protocol import Sampling
from drift import Variant
from harness import Summary
from tiny import tiny_llama, tiny_tokenizer


def reject_ends(prompts: list[str], answers: list[str]) -> list[RejectionRecord]:
    """Every answer rejected but for its first character."""
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if len(answer) > 1]
    return [make_record(prompt, [answer], [1], 1, [[(1, len(answer))]]) for prompt, answer in pairs]


def test_a_variant_is_trained_and_measured_at_two_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    for part in (tiny_llama(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "base")
    settings = (("max_steps", 2), ("lora_rank", 2), ("max_rejected", 3), ("learning_rate", 1e-2))
    names = {"BUNDLED": str(tmp_path / "base"), "MINED": 6, "MINED_TOKENS": 12, "UNSEEN": 4, "SAMPLED": 2}
    small = {"PASSAGE_TOKENS": 16, "judge_loops": reject_ends, "VARIANTS": [Variant("small", settings, 8, 8)]}
    samplings = {"SAMPLINGS": {"long": Sampling(8), "t1": Sampling(4, temperature=1.0)}}
    for name, value in (names | small | samplings).items():
        monkeypatch.setattr(drift, name, value)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"The {n} cats sat on the mat."}) + "\n" for n in range(2)))
    folder = tmp_path / "study"
    monkeypatch.setattr(
        sys, "argv", ["drift.py", "--texts", f"some={texts}", "--seeds", "42", "--long", "-o", str(folder)]
    )
    drift.main()
    rows = Summary(folder).rows
    assert list(rows) == [
        "base",
        "base, long and sampled",
        *(f"small-seed42{end}" for end in ("", " at KL 0.02", ", long and sampled")),
    ]
    trained, scaled = rows["small-seed42"], rows["small-seed42 at KL 0.02"]
    assert (trained["steps"], trained["prompts"], trained["max_rejected"]) == (2, 4, 3)
    assert trained["kl_some"] > 0
    assert scaled["scale"] == pytest.approx((0.02 / trained["kl_some"]) ** 0.5, rel=1e-5)
    shown = capsys.readouterr().out
    assert "| small-seed42 |" in shown
    assert "| small-seed42, long and sampled |" in shown
    monkeypatch.setattr(drift, "draw", None)
    drift.main()  # what is there is not measured again
