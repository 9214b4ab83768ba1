"""The output head's logits, however they are computed."""

from __future__ import annotations

import pytest
import torch

from buleyean_rl.models.output_head import OutputHead


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("nodes", "with_bias", "has_bf16"), [(1, True, False), (33, False, False), (64, True, True), (1, False, True)]
)
def test_project_is_a_product(nodes: int, with_bias: bool, has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: has_bf16)
    torch.manual_seed(nodes)
    weight, hidden = torch.randn(160, 64).bfloat16(), torch.randn(64, nodes).bfloat16().T
    bias = torch.randn(160).bfloat16() if with_bias else None
    raw = OutputHead(weight, bias).project(hidden)
    exact = weight.double() @ hidden.double().T
    if bias is not None:
        exact += bias.double().unsqueeze(1)
    assert raw.is_contiguous()
    torch.testing.assert_close(raw.double(), exact, rtol=2**-7, atol=0.1)
