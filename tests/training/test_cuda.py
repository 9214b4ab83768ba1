"""On a GPU, where there is one: the loss, the layout and a run are what they are on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapted import TOKENIZER, adapted
from buleyean_rl.batching.batch import pack, pad_paths
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.views import backbone, plain_model
from buleyean_rl.objectives.fused import fused_loss
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training.trainer import BuleyeanTrainer
from dense import OBJECTIVES, dense_loss, inputs
from tiny import tiny_llama, tiny_qwen2
from tiny_trainer import RECORDS, trainer

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(3, 48, 31), (2100, 64, 4099)])
def test_the_fused_loss_is_the_dense_one(
    objective: Objective, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    hidden, head, counts, reference = inputs(shape, dtype, objective)
    exact = hidden.double().requires_grad_()
    expected = dense_loss(
        exact,
        OutputHead(head.weight.double()),
        counts,
        objective,
        None if reference is None else reference.double(),
    )
    expected.loss.sum().backward()
    here = hidden.cuda().requires_grad_()
    got = fused_loss(
        here,
        OutputHead(head.weight.cuda()),
        counts.to(here.device),
        objective,
        None if reference is None else reference.cuda(),
    )
    got.loss.sum().backward()
    assert here.grad is not None
    assert exact.grad is not None
    for ours, theirs in ((got.loss.cpu().double(), expected.loss), (here.grad.cpu().double(), exact.grad)):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_norms_are_the_model_s_own(make: Any) -> None:
    torch.manual_seed(0)
    model = make(TOKENIZER).bfloat16().requires_grad_(False)
    x = torch.randn(2, 9, 64).bfloat16()

    def outcome() -> tuple[torch.Tensor, ...]:
        inputs = x.to(model.device, model.dtype, copy=True).requires_grad_()
        positions = torch.arange(9, device=model.device).expand(2, -1)
        layer = model.model.layers[0]
        y = layer(inputs, position_embeddings=model.model.rotary_emb(inputs, positions))
        (y.double() * torch.linspace(-1, 2, y.numel(), device=model.device).view_as(y)).sum().backward()
        assert inputs.grad is not None
        return y.cpu().double(), inputs.grad.cpu().double()

    model.double()
    exact = outcome()
    model.bfloat16().cuda()
    own = outcome()
    fuse_layers(model)
    assert "forward" in vars(model.model.norm)
    for got, plain, expected in zip(outcome(), own, exact, strict=True):
        assert (got - expected).norm() <= 1.2 * (plain - expected).norm() + 1e-3 * expected.norm()


def test_a_packed_model_is_a_padded_one_in_bf16() -> None:
    model = adapted(lambda: tiny_llama(TOKENIZER).bfloat16()).cuda()
    own = plain_model(model).config._attn_implementation
    assert probe_layout(model) == "packed"
    device = torch.device("cuda")
    row = pack(RECORDS).to(device)
    with torch.no_grad():
        packed = forward_hidden(backbone(model), row).float()
    plain_model(model).set_attn_implementation(own)
    with torch.no_grad():
        padded = forward_hidden(backbone(model), pad_paths(RECORDS).to(device)).float()
    assert (packed - padded).norm() <= 0.02 * padded.norm()


def test_a_run_logs_what_it_logs_on_a_cpu(tmp_path: Path) -> None:
    def losses(**where: bool) -> list[float]:
        run: BuleyeanTrainer = trainer(
            adapted(lambda: tiny_llama(TOKENIZER)), tmp_path, RECORDS, max_steps=6, learning_rate=1e-2, **where
        )
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "floor" in entry]

    there, here = losses(), losses(use_cpu=True)
    assert there == pytest.approx(here, rel=1e-2)
    assert there[-1] < there[0]
