"""The parity gate: every fault planted in a file is caught, and the message says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import write_unchecked

from buleyean_rl.errors import ParityError
from buleyean_rl.gguf import blueprint_from_model, check_parity, vocabulary, write_gguf
from buleyean_rl.gguf.metadata import make_field
from gguf import GGUFReader
from tiny import tiny_llama, tiny_tokenizer


def test_a_file_without_faults_passes(tmp_path: Path) -> None:
    path, model, tokenizer = write_unchecked(tmp_path)
    report = check_parity(model, tokenizer, path)
    assert (report.tensors, report.positions) == (20, 32)


@pytest.mark.parametrize(
    ("name", "quant"),
    [("blk.1.attn_norm.weight", "f16"), ("blk.0.ffn_up.weight", "q8_0"), ("token_embd.weight", "q4_0")],
)
def test_a_flipped_byte_is_caught(name: str, quant: str, tmp_path: Path) -> None:
    path, model, tokenizer = write_unchecked(tmp_path, quant=quant)
    tensor = next(tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == name)
    tensor.data.reshape(-1).view(np.uint8)[-1] ^= 0x40
    with pytest.raises(ParityError, match=rf"tensor {name} \(\w+\) differs from the model's in 1 of \d+ bytes"):
        check_parity(model, tokenizer, path)


def test_the_weights_of_another_model_are_caught(tmp_path: Path) -> None:
    path, _, tokenizer = write_unchecked(tmp_path)
    with pytest.raises(ParityError, match="differs from the model's"):
        check_parity(tiny_llama(tokenizer, seed=1), tokenizer, path)


def test_a_wrong_chat_template_is_caught(tmp_path: Path) -> None:
    wrong = tiny_tokenizer()
    wrong.chat_template = wrong.chat_template.replace("<|im_end|>", "<|im_start|>")
    path, model, tokenizer = write_unchecked(tmp_path, tokenizer=wrong)
    with pytest.raises(ParityError, match="chat template renders differently"):
        check_parity(model, tokenizer, path)


def test_swapped_tokens_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vocabulary._tokens

    def swapped(*args: Any) -> list[str]:
        tokens = right(*args)
        tokens[300], tokens[301] = tokens[301], tokens[300]
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_tokens", swapped)
        path, model, tokenizer = write_unchecked(tmp_path)
    with pytest.raises(ParityError, match="vocabulary differs: token 300 is"):
        check_parity(model, tokenizer, path)


def test_swapped_merges_are_caught(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(tiny_tokenizer()), tiny_tokenizer()
    planned = blueprint_from_model(model, tokenizer)
    planned.metadata["tokenizer.ggml.merges"].value.reverse()
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match=r"token ids of .* differ"):
        check_parity(model, tokenizer, path)


@pytest.mark.parametrize(
    ("key", "wrong", "problem"),
    [
        ("tokenizer.ggml.add_bos_token", True, r"token ids of .* differ|add_bos_token differs"),
        ("tokenizer.ggml.eos_token_id", 5, "EOS differs: token 2, and 5 in the file"),
        ("tokenizer.ggml.pre", "llama-bpe", r"token ids of .* differ"),
        ("llama.rope.freq_base", 1e6, "log-probabilities differ"),
        ("llama.attention.head_count_kv", 4, r"cannot (load|run)|log-probabilities differ"),
    ],
)
def test_wrong_metadata_is_caught(key: str, wrong: Any, problem: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(tiny_tokenizer()), tiny_tokenizer()
    planned = blueprint_from_model(model, tokenizer)
    assert key in planned.metadata
    planned.metadata[key] = make_field(wrong)
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match=problem):
        check_parity(model, tokenizer, path)


def test_an_answer_that_does_not_end_is_caught(tmp_path: Path) -> None:
    path, model, tokenizer = write_unchecked(tmp_path)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    with pytest.raises(ParityError, match="does not end an answer at token 7"):
        check_parity(model, tokenizer, path)
