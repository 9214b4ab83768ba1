"""Passages that a base writes: sampled from its own distribution, once, by the base of an adapter too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from buleyean_rl.inference import own_text
from buleyean_rl.inference.own_text import own_passages, start_token
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import open_model
from buleyean_rl.models.source import resolve
from tiny import tiny_run


def test_passages_are_drawn_once_and_by_the_base_of_a_run(
    base: Path, tmp_path: Path, use_cache: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(tmp_path / "cache")
    model = open_model(str(base))
    start, ends = start_token(model.tokenizer), {model.tokenizer.eos_token_id}
    passages = own_passages(model, 3, 9)
    assert len(passages) == 3
    for passage in passages:
        assert passage[0] == start
        assert len(passage) == 9 or passage[-1] in ends
        assert ends.isdisjoint(passage[:-1])
    assert passages[0] != passages[1]
    assert own_passages(model, 3, 9, seed=1)[:2] == passages[1:]  # the i-th has seed + i
    monkeypatch.setattr(own_text, "engine_of", None)  # all are cached by now
    assert own_passages(model, 3, 9) == passages
    run = open_model(resolve(str(base)).with_adapter(tiny_run(tmp_path / "run", base)), keep_adapter=True)
    assert own_passages(run, 3, 9) == passages
    in_training = open_model(str(base))
    in_training.attach_adapter(lora_config(4, 8, 0.0, None))
    assert own_passages(in_training, 3, 9) == passages


class Spelling:
    """A tokenizer of nothing but names of special tokens."""

    def __init__(self, vocabulary: dict[str, int], bos: int | None, eos: int | None, *, adds_bos: bool) -> None:
        self.get_vocab = lambda: vocabulary
        self.bos_token_id, self.eos_token_id, self._adds_bos = bos, eos, adds_bos

    def __call__(self, _text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 9] if self._adds_bos else [9]}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Spelling({"<|endoftext|>": 5}, 1, 2, adds_bos=True), 1),  # Llama
        (Spelling({"<|endoftext|>": 5}, 1, 2, adds_bos=False), 5),  # SmolLM2: its BOS begins a conversation
        (Spelling({}, None, 2, adds_bos=False), 2),
        (Spelling({}, None, None, adds_bos=False), 0),
    ],
)
def test_where_a_text_of_its_own_begins(tokenizer: Spelling, expected: int) -> None:
    assert start_token(tokenizer) == expected


def test_what_is_continued_is_greedily_the_likeliest(base: Path) -> None:
    model = open_model(str(base), dtype=torch.float32)
    engine = TransformersEngine(model.plain, model.tokenizer)
    ((first, *_), other) = engine.continue_ids([[5, 6, 7], [8]], Sampling(max_tokens=2))
    with torch.no_grad():
        logits = [model.plain(torch.tensor([ids])).logits[0, -1] for ids in ([5, 6, 7], [8])]
    assert [first, other[0]] == [int(each.argmax()) for each in logits]
