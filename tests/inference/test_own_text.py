"""What a base model writes itself: the same each time, from the base whatever its adapter, drawn once."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapted import TOKENIZER, adapted, stir
from buleyean_rl.inference import own_text
from buleyean_rl.inference.own_text import continue_ids, own_passages, start_of_text
from buleyean_rl.models.model import Model
from tiny import tiny_llama


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def make_model(*, stirred: bool = False) -> Model:
    module = adapted(lambda: tiny_llama(TOKENIZER))
    model = Model.from_module(stir(module) if stirred else module, TOKENIZER)
    vars(model)["numerics"] = {"weights": "tiny"}  # a model in memory has no fingerprint
    return model


def test_passages_begin_at_the_start_of_a_text_and_differ() -> None:
    passages = own_passages(make_model(), 4, 10)
    assert {ids[0] for ids in passages} == {start_of_text(TOKENIZER)}
    assert all(1 < len(ids) <= 10 for ids in passages)
    assert len({tuple(ids) for ids in passages}) == len(passages) > 1


def test_the_base_writes_whatever_its_adapter_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = continue_ids(make_model(), [[5, 6], [7]], 8)
    monkeypatch.setattr(own_text, "memoize_to_disk", lambda _kind, _inputs, compute: compute())
    assert continue_ids(make_model(stirred=True), [[5, 6], [7]], 8) == plain
    assert continue_ids(make_model(), [[5, 6], [7]], 8, seed=9) != plain


def test_what_was_drawn_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    first = continue_ids(model, [[5, 6]], 8)
    monkeypatch.setattr(own_text, "TransformersEngine", None)
    assert continue_ids(model, [[5, 6]], 8) == first


def test_a_prompt_that_fills_the_context_is_not_continued() -> None:
    model = make_model()
    longest = model.plain.config.max_position_embeddings
    assert continue_ids(model, [[5] * longest, [5]], 4)[0] == []


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
    assert start_of_text(tokenizer) == expected
