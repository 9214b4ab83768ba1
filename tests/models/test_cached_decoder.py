"""A model with a cache that many sequences share: transformers' logits, whatever is computed beside a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from buleyean_rl.kernels.decode import CACHE_BLOCK, Draws
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.cached_decoder import CachedDecoder, UnsupportedModel
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.views import plain_model
from marks import needs_c
from tiny import tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

pytestmark = needs_c
SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 416}
MODELS = {
    "Llama": lambda: tiny_llama(tiny_tokenizer(), **SIZES),
    "Llama with biases": lambda: tiny_llama(tiny_tokenizer(), tie=False, attention_bias=True, mlp_bias=True, **SIZES),
    "Mistral": lambda: tiny_mistral(tiny_tokenizer(), sliding_window=None, **SIZES),
    "Qwen2": lambda: tiny_qwen2(tiny_tokenizer(), **(SIZES | {"hidden_size": 128})),
    "Qwen3": lambda: tiny_model("Qwen3ForCausalLM", tiny_tokenizer(), **SIZES),
}
IDS = [7 * i % 400 for i in range(3 * CACHE_BLOCK + 5)]


def in_bf16(name: str = "Llama") -> PreTrainedModel:
    return MODELS[name]().bfloat16()


def adapted(model: PreTrainedModel, **lora: Any) -> Any:
    """With an adapter that changes what the model says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft = attach_lora(model, lora_config(8, 16, 0.0, lora.get("target_modules")))
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return peft.eval()


class Blocks:
    """A table of blocks for some sequences."""

    def __init__(self, decoder: CachedDecoder, sequences: int, tokens: int = 128) -> None:
        count = tokens // CACHE_BLOCK
        self._memory = torch.full((sequences * count, decoder.decoder.block_numbers), torch.nan, dtype=torch.bfloat16)
        addresses = [block.data_ptr() for block in self._memory]
        self.table = torch.tensor(addresses).view(sequences, count)


def draw_all(rows: int) -> Draws:
    return Draws(torch.arange(rows), torch.zeros(rows), torch.ones(rows), torch.zeros(rows))


def logits(
    decoder: CachedDecoder, ids: Sequence[int], blocks: Blocks, start: int = 0, sequence: int = 0
) -> torch.Tensor:
    """After each token. Shape: (tokens, vocabulary)."""
    count = len(ids)
    decoder.step(ids, [sequence] * count, list(range(start, start + count)), blocks.table, draw_all(count))
    return decoder.decoder.logits[:count].clone()


def expected_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert error.mean() < 0.02
    assert error.max() < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name: str, instruction_set: str) -> None:
    model = in_bf16(name)
    decoder = CachedDecoder(model)
    ours, theirs = logits(decoder, IDS, Blocks(decoder, 1)), expected_logits(model, IDS)
    exact = expected_logits(model.double(), IDS)
    ours, theirs, exact = (each.log_softmax(-1) for each in (ours, theirs, exact))
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()
    assert instruction_set


@pytest.mark.parametrize("modules", [None, ["q_proj", "down_proj"], ["k_proj", "up_proj"]])
def test_an_adapter_is_applied_as_it_is(modules: list[str] | None) -> None:
    model = adapted(in_bf16(), target_modules=modules)
    decoder = CachedDecoder(model)
    assert_close(logits(decoder, IDS, Blocks(decoder, 1)), expected_logits(model, IDS))
    assert (logits(decoder, IDS, Blocks(decoder, 1)) - expected_logits(plain_model(model).eval(), IDS)).abs().max() < 1
    with model.disable_adapter():
        assert decoder.refresh()
        base = logits(decoder, IDS, Blocks(decoder, 1))
    assert_close(base, expected_logits(in_bf16(), IDS))


def test_the_plain_model_in_an_adapted_one_is_decoded() -> None:
    model = adapted(in_bf16())
    decoder = CachedDecoder(plain_model(model))
    assert_close(logits(decoder, IDS, Blocks(decoder, 1)), expected_logits(model, IDS))


def test_a_changed_adapter_is_noticed() -> None:
    model = adapted(in_bf16())
    decoder = CachedDecoder(model)
    before = logits(decoder, IDS, Blocks(decoder, 1))
    assert not decoder.refresh()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert decoder.refresh()
    after = logits(decoder, IDS, Blocks(decoder, 1))
    assert not torch.equal(before, after)
    assert_close(after, expected_logits(model, IDS))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_row_does_not_depend_on_those_beside_it(with_adapter: bool, instruction_set: str) -> None:
    model = adapted(in_bf16()) if with_adapter else in_bf16()
    decoder = CachedDecoder(model)
    blocks = Blocks(decoder, 8)
    whole = logits(decoder, IDS, blocks)
    one_by_one = [logits(decoder, [token], blocks, start=i, sequence=1)[0] for i, token in enumerate(IDS)]
    assert torch.equal(whole, torch.stack(one_by_one))
    in_parts = [logits(decoder, IDS[i : i + 7], blocks, start=i, sequence=2) for i in range(0, len(IDS), 7)]
    assert torch.equal(whole, torch.cat(in_parts))
    others = [(5 * i % 400, 3 + i % 5, i // 5) for i in range(60)]
    rows = [*others[:23], *((token, 1, i) for i, token in enumerate(IDS)), *others[23:]]
    tokens, sequences, positions = (list(column) for column in zip(*rows, strict=True))
    decoder.step(tokens, sequences, positions, blocks.table, draw_all(len(rows)))
    assert torch.equal(whole, decoder.decoder.logits[23 : 23 + len(IDS)])
    assert instruction_set


def test_positions_beyond_the_first_tables() -> None:
    model = tiny_llama(tiny_tokenizer(), max_position_embeddings=4096, **SIZES).bfloat16()
    decoder = CachedDecoder(model)
    blocks = Blocks(decoder, 1, 2048)
    ids = [11 * i % 400 for i in range(1200)]
    assert_close(logits(decoder, ids, blocks)[-50:], expected_logits(model, ids)[-50:])


@pytest.mark.parametrize(
    "model",
    [
        lambda: MODELS["Llama"](),
        lambda: tiny_llama(tiny_tokenizer(), **(SIZES | {"head_dim": 16})).bfloat16(),
        lambda: tiny_llama(tiny_tokenizer(), **(SIZES | {"vocab_size": 410})).bfloat16(),
        lambda: tiny_llama(tiny_tokenizer(), hidden_act="gelu", **SIZES).bfloat16(),
        lambda: tiny_model("Gemma2ForCausalLM", tiny_tokenizer(), **SIZES).bfloat16(),
        lambda: tiny_model("GPT2LMHeadModel", tiny_tokenizer(), n_embd=64, n_head=2, n_layer=2).bfloat16(),
        lambda: tiny_model("SmolLM3ForCausalLM", tiny_tokenizer(), no_rope_layers=[1, 0], **SIZES).bfloat16(),
        lambda: tiny_model("GraniteForCausalLM", tiny_tokenizer(), residual_multiplier=0.5, **SIZES).bfloat16(),
        lambda: tiny_llama(
            tiny_tokenizer(), rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, **SIZES
        ).bfloat16(),
    ],
    ids=[
        "fp32",
        "head width",
        "vocabulary",
        "gelu",
        "Gemma 2",
        "GPT-2",
        "no rotations",
        "Granite",
        "dynamic rotations",
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModel):
        CachedDecoder(model())
