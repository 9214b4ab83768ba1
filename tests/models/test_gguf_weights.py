"""Models in their blocks: a GGUF file's own, and those that another base is quantised to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from adapted import outcome, packed_model
from buleyean_rl.gguf import export_gguf
from buleyean_rl.kernels.decode import Draws
from buleyean_rl.kernels.quantised import QuantisedTensor
from buleyean_rl.models import placement
from buleyean_rl.models.cached_decoder import CachedDecoder
from buleyean_rl.models.model import open_model
from buleyean_rl.models.views import backbone
from buleyean_rl.models.weights import load_base
from tiny import tiny_llama, tiny_model, tiny_qwen2, tiny_tokenizer

IDS = torch.arange(4, 68).unsqueeze(0)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 416}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of several architectures, in Q8_0."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), tiny_tokenizer("gpt-2")
    models = {
        "llama": tiny_llama(tokenizer, tie=False),
        "qwen2": tiny_qwen2(tokenizer),
        "gemma3": tiny_model("Gemma3ForCausalLM", tokenizer, head_dim=32, query_pre_attn_scalar=32),
    }
    return {
        name: export_gguf(model, tokenizer, folder / f"{name}.gguf", "q8_0", gate=False).path
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_file_is_read_as_transformers_reads_it(name: str, files: dict[str, Path]) -> None:
    path = files[name]
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    numbers, blocks = load_base(str(path)), load_base(str(path), bits=None)
    assert {name: value.shape for name, value in numbers.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }
    for parameter, value in theirs.items():
        torch.testing.assert_close(numbers.state_dict()[parameter], value)
    assert any(isinstance(parameter, QuantisedTensor) for parameter in blocks.parameters())
    torch.testing.assert_close(blocks(IDS).logits, numbers(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_a_file_stays_in_its_blocks_where_it_is_large(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_model(str(files["llama"]), dtype=torch.bfloat16).base_bits == 16
    monkeypatch.setattr(placement, "LARGE", 1000)
    model = open_model(str(files["llama"]), dtype=torch.bfloat16)
    assert model.base_bits is None
    assert model.numerics["base_bits"] is None
    assert "weights of 8." in model.describe()


@pytest.fixture(params=[4, 8])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, int]:
    """A model, the same with its numbers rounded to blocks, and to how many bits."""
    tokenizer, bits = tiny_tokenizer(), request.param
    for part in (tiny_llama(tokenizer, **SIZES).bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), torch.bfloat16, bits)
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), QuantisedTensor):
            module.weight = torch.nn.Parameter(module.weight.dequantise())
    model.tie_weights()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rounded")
    return tmp_path / "base", tmp_path / "rounded", bits


@pytest.mark.usefixtures("kernels")
def test_an_adapter_on_blocks_has_the_gradient_of_their_numbers(folder: tuple[Path, Path, int]) -> None:
    base, rounded, bits = folder
    results = []
    for path, number in ((base, bits), (rounded, 16)):
        model = packed_model(lambda _, p=path, n=number: load_base(str(p), torch.bfloat16, n))
        assert "forward" in vars(backbone(model))  # of the fused decoder
        results.append(outcome(model))
    assert all(ours.equal(theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.usefixtures("kernels")
def test_a_model_in_blocks_answers_as_its_numbers_do(folder: tuple[Path, Path, int]) -> None:
    base, rounded, bits = folder
    drawn = []
    for path, number in ((base, bits), (rounded, 16)):
        decoder = CachedDecoder(load_base(str(path), torch.bfloat16, number))
        memory = torch.zeros(decoder.decoder.block_numbers, dtype=torch.bfloat16)
        draws = Draws(torch.tensor([5]), torch.zeros(1), torch.ones(1), torch.zeros(1))
        blocks = torch.tensor([[memory.data_ptr()]])
        drawn.append(decoder.step([7, 9, 5, 6, 99, 300], [0] * 6, [*range(6)], blocks, draws))
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("kernels")
def test_the_output_head_of_blocks(folder: tuple[Path, Path, int]) -> None:
    base, rounded, bits = folder
    heads = [
        open_model(str(base), base_bits=bits, dtype=torch.bfloat16).head,
        open_model(str(rounded), dtype=torch.bfloat16).head,
    ]
    torch.manual_seed(0)
    hidden, gradient = torch.randn(5, 128).bfloat16(), torch.randn(416, 5).bfloat16()
    ours, theirs = ([head.project(hidden), head.project_backward(gradient)] for head in heads)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
