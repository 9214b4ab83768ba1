"""The fused losses against the dense ones: value and gradient, odd shapes, every precision."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from buleyean_rl.kernels import elementwise, matmul
from buleyean_rl.models import output_head
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import fused_loss, token_logprobs
from buleyean_rl.objectives.losses import NodeLosses, Objective, complement_loss, published_loss, ratio_loss

OBJECTIVES = [
    Objective("published"),
    Objective("complement"),
    Objective("published", alpha=1.0, tau=0.5),
    Objective("complement", alpha=0.3, tau=2.0),
    Objective("ratio"),
    Objective("ratio", alpha=0.3, tau=0.1),
]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
SHAPES = [(1, 1, 2), (3, 47, 31), (47, 31, 123), (130, 16, 257)]  # nodes, width, vocabulary


def random_counts(nodes: int, vocabulary: int, entries: int, rounds: int = 10) -> Counts:
    """Up to `entries` rejections per node, some nodes with none, counts beyond T included."""
    rows = []
    for node in range(nodes):
        for token in torch.randperm(vocabulary)[: torch.randint(0, entries + 1, ()).item()].tolist():
            rows.append((node, token, torch.randint(1, rounds + 3, ()).item()))
    node, option, count = (
        (torch.tensor(column) for column in zip(*rows, strict=True))
        if rows
        else (torch.zeros(0, dtype=torch.long),) * 3
    )
    return Counts(node, option, count.float(), torch.full((nodes,), float(rounds)))


def dense_loss(
    hidden: Tensor, head: OutputHead, counts: Counts, objective: Objective, reference: Tensor | None
) -> NodeLosses:
    logits = head(hidden)
    counts = counts.astype(logits.dtype)
    if reference is None:
        return published_loss(logits, counts, objective)
    of_rejections = ratio_loss if objective.name == "ratio" else complement_loss
    return of_rejections(logits, head(reference), counts, objective)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, objective: Objective, **head: object
) -> tuple[Tensor, OutputHead, Counts, Tensor | None]:
    nodes, width, vocabulary = shape
    hidden = torch.randn(nodes, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    reference = (hidden + torch.randn(nodes, width) / 4).to(dtype) if objective.uses_reference else None
    return hidden, OutputHead(weight, **head), random_counts(nodes, vocabulary, 3), reference  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 3.0}, {"bias": True}])
def test_fused_equals_dense(
    objective: Objective,
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, int, int],
    head: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(output_head, "TILE", 10)  # several tiles, the last one ragged
    monkeypatch.setattr(output_head, "CHUNK", 64)
    if "bias" in head:
        head = {"bias": torch.randn(shape[2]).to(dtype)}
    hidden, output, counts, reference = inputs(shape, dtype, objective, **head)
    results = []
    for loss in (fused_loss, dense_loss):
        h = hidden.clone().requires_grad_()
        losses = loss(h, output, counts, objective, reference)
        (losses.loss * torch.linspace(0.5, 2, len(h))).sum().backward()
        results.append((losses, h.grad))
    (got, got_grad), (expected, expected_grad) = results
    for name in NodeLosses._fields:
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(expected, name).double(), rtol=tolerance, atol=tolerance
        )
    scale = expected_grad.double().abs().max().clamp_min(1e-3)
    torch.testing.assert_close(
        got_grad.double() / scale, expected_grad.double() / scale, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS[1:])
def test_the_kernels_for_cuda_make_the_same_loss(
    objective: Objective, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = pytest.importorskip("buleyean_rl.kernels.triton")
    if torch.cuda.device_count():
        pytest.skip("not interpreted where there is a GPU: test_cuda has it there")
    monkeypatch.setattr(elementwise, "loss_passes", lambda _tile: passes)
    test_fused_equals_dense(objective, dtype, tolerance, (47, 31, 123), {"scale": 0.5}, monkeypatch)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(1, 32, 64), (47, 64, 1056), (530, 32, 512)], ids=str)  # nodes, width, vocabulary
@pytest.mark.parametrize("drift", [0.0, 3.0])  # of all the reference's logits
def test_in_tiles_fused_is_dense(objective: Objective, shape: tuple[int, int, int], drift: float) -> None:
    torch.manual_seed(0)
    hidden, output, counts, reference = inputs(shape, torch.bfloat16, objective, scale=0.5)
    output.weight[:, 0] = 1
    if reference is not None:
        reference[:, 0] += 2 * drift
    assert matmul.has_head_sums(output.weight)
    results = []
    for loss, precision in ((fused_loss, torch.bfloat16), (dense_loss, torch.float64)):
        h = hidden.detach().clone().to(precision).requires_grad_()
        head = OutputHead(output.weight.to(precision), scale=0.5)
        losses = loss(h, head, counts, objective, None if reference is None else reference.to(precision))
        (losses.loss * torch.linspace(0.5, 2, len(h))).sum().backward()
        results.append((losses, h.grad))
    (got, got_grad), (expected, expected_grad) = results
    for name in NodeLosses._fields:
        torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=1e-4, atol=1e-4)
    scale = expected_grad.abs().max()
    torch.testing.assert_close(got_grad.double() / scale, expected_grad / scale, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_tiles_a_model_like_its_reference_has_nothing_to_learn_of_it(objective: Objective) -> None:
    hidden, output, counts, reference = inputs((40, 64, 512), torch.bfloat16, objective)
    if reference is None:
        return
    none = Counts(*(x[:0] for x in (counts.node, counts.option, counts.count)), counts.rounds)
    hidden.requires_grad_()
    losses = fused_loss(hidden, output, none, objective, hidden.detach().clone())
    losses.loss.sum().backward()
    torch.testing.assert_close(losses.loss, torch.zeros(40), rtol=0, atol=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 8.0])
@pytest.mark.parametrize("margin", [5.0, 14.0, 26.0])
@pytest.mark.parametrize("name", ["complement", "ratio"])
def test_a_model_that_is_sure_of_what_was_rejected(
    name: Literal["complement", "ratio"], margin: float, tau: float, dtype: torch.dtype
) -> None:
    """As in exact arithmetic: up to 1 - p = 1e-9, none in fp32, and to a target that weighs it 2e14 times less."""
    torch.manual_seed(2)
    weight = (torch.randn(200, 64) / 8).to(dtype)
    weight[:, :2], weight[3, :2] = 0, torch.tensor([margin, margin])  # token 3 stands out by the first two widths
    reference = torch.randn(4, 64).to(dtype)
    reference[:, 0], reference[:, 1] = 1, 0
    hidden = reference.clone()
    hidden[2:, 0] = 0.75  # some nodes have moved away from the reference
    counts = Counts(*torch.tensor([[0, 1, 1, 2], [3, 3, 7, 3]]), torch.tensor([60.0, 60, 2, 9]), torch.full((4,), 60.0))
    objective, head = Objective(name, tau=tau), OutputHead(weight)

    results = []
    for loss, precision in ((fused_loss, dtype), (dense_loss, torch.float64)):
        h = hidden.to(precision).clone().requires_grad_()
        losses = loss(h, OutputHead(head.weight.to(precision)), counts, objective, reference.to(precision))
        losses.loss.sum().backward()
        results.append((losses, h.grad.double()))
    (got, got_grad), (expected, expected_grad) = results
    precise = 1e-4 if dtype == torch.float32 else 1e-6  # nats of a sum whose terms are logits of up to 26
    for field in NodeLosses._fields:
        torch.testing.assert_close(getattr(got, field).double(), getattr(expected, field), rtol=precise, atol=precise)
    scale = expected_grad.abs().max().item()
    if name == "ratio":  # hardly pushes where the model is sure; its rounding is that of a push along the margin
        scale = max(scale, (1 - objective.alpha) * margin)
    torch.testing.assert_close(got_grad, expected_grad, rtol=precise, atol=precise * scale)


# --- what has no loss, what is never made


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_without_nodes_is_a_differentiable_zero(objective: Objective, dtype: torch.dtype) -> None:
    hidden, head, _, reference = inputs((3, 4, 7), dtype, objective)
    hidden.requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    losses = fused_loss(
        hidden[:0],
        head,
        Counts(nothing, nothing, nothing.float(), nothing.float()),
        objective,
        None if reference is None else reference[:0],
    )
    losses.loss.sum().backward()
    assert losses.loss.sum() == 0
    assert [len(part) for part in losses] == [0] * 4
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nodes_without_rejections_are_worth_their_kl_alone(objective: Objective) -> None:
    hidden, head, _, reference = inputs((5, 4, 7), torch.float64, objective)
    nothing = torch.zeros(0, dtype=torch.long)
    counts = Counts(nothing, nothing, nothing.double(), torch.full((5,), 3.0).double())
    base = torch.full((5, 7), 1 / 7).double() if reference is None else head(reference).softmax(-1)
    losses = fused_loss(hidden, head, counts, objective, reference)
    kl = (base * (base.log() - head(hidden).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses.loss, objective.alpha * kl)
    assert not losses.contrast.any()
    assert not losses.floor.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_node_does_not_notice_the_others(objective: Objective) -> None:
    hidden, head, counts, reference = inputs((9, 6, 31), torch.float64, objective)
    before = fused_loss(hidden, head, counts, objective, reference)
    others = hidden.clone()
    others[1:] = 50 * torch.randn(8, 6).double()
    after = fused_loss(others, head, counts, objective, reference)
    for name in NodeLosses._fields:
        assert getattr(before, name)[0] == pytest.approx(getattr(after, name)[0].item())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_no_loss_is_below_its_floor(objective: Objective, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    hidden, head, counts, reference = inputs((300, 16, 40), dtype, objective)
    losses = fused_loss(3 * hidden, head, counts, objective, None if reference is None else 3 * reference)
    assert (losses.loss >= losses.floor - tolerance).all()
    assert (losses.kl >= -tolerance).all()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.elements = max(self.elements, *(t.numel() for t in made if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_nothing_of_size_nodes_times_vocabulary_is_ever_made(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, width, vocabulary = 200, 4, 500
    monkeypatch.setattr(output_head, "TILE", 5)  # two such tiles in one tensor
    hidden, head, counts, reference = inputs((nodes, width, vocabulary), torch.float32, objective)
    hidden.requires_grad_()
    with Largest() as largest:
        fused_loss(hidden, head, counts, objective, reference).loss.sum().backward()
    assert vocabulary <= largest.elements <= 5000


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5}], ids=str)
def test_token_logprobs_are_those_of_the_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, head: dict[str, float]
) -> None:
    torch.manual_seed(0)
    hidden, output_head, _, _ = inputs(shape, dtype, Objective(), **head)
    tokens, grad = (
        torch.randint(0, shape[2], shape[:1]),
        torch.randn(shape[0]).to(torch.promote_types(dtype, torch.float32)),
    )
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = token_logprobs(ours, output_head, tokens)
    expected = output_head(theirs).log_softmax(-1).gather(1, tokens.unsqueeze(1))[:, 0]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for value in (got, expected):
        value.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=tolerance)
