"""Masks of LoRA's dropout: their share, their seed, and that with keys they go with the record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from buleyean_rl.models.dropout import dropout_keys_in_use, seeded_dropout


@pytest.fixture(params=["seed", "keys"])
def masks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Masks by their seed alone, or by keys too."""
    with dropout_keys_in_use(torch.arange(400) + (7 << 32) if request.param == "keys" else None):
        yield


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.5), (torch.bfloat16, 0.05)])
def test_dropout_drops_its_share_and_scales_the_rest(dtype: torch.dtype, p: float) -> None:
    x = torch.ones(400, 250, dtype=dtype)
    masks = torch.stack([seeded_dropout(x, p, seed) for seed in range(8)]).float()
    dropped = masks == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.004)  # five standard deviations
    torch.testing.assert_close(masks[~dropped], torch.full_like(masks[~dropped], 1 / (1 - p)), rtol=4e-3, atol=0)
    both = (
        (dropped[0] & dropped[1:]).float().mean().item()
    )  # masks of different seeds have nothing to do with each other
    assert both == pytest.approx(p**2, abs=0.004)
    for dim in (1, 2):  # nor have rows, nor columns
        neighbours = (dropped & dropped.roll(1, dim)).float().mean().item()
        assert neighbours == pytest.approx(p**2, abs=0.004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_its_seed_and_may_be_added(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 30, 7).to(dtype)
    dropped = seeded_dropout(x, 0.3, 5)
    assert dropped.equal(seeded_dropout(x, 0.3, 5))
    assert not dropped.equal(seeded_dropout(x, 0.3, 6))
    torch.testing.assert_close(seeded_dropout(x, 0.3, 5, y.clone()), y + dropped, rtol=1e-2, atol=1e-2)


def test_a_tokens_mask_is_its_keys_wherever_it_is() -> None:
    keys, order = torch.arange(30) << 32, torch.randperm(30)
    with dropout_keys_in_use(keys):
        mask = seeded_dropout(torch.ones(30, 9), 0.5, 3)
    with dropout_keys_in_use(keys[order]):
        assert seeded_dropout(torch.ones(30, 9), 0.5, 3).equal(mask[order])
        assert not seeded_dropout(torch.ones(30, 9), 0.5, 4).equal(mask[order])
