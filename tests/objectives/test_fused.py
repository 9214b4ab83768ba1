"""The fused losses against the dense ones: value and gradient, odd shapes, every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from buleyean_rl.kernels import elementwise, matmul
from buleyean_rl.models import output_head
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts, Prior
from buleyean_rl.objectives.fused import fused_loss, token_logprobs
from buleyean_rl.objectives.losses import NodeLosses, Objective
from dense import OBJECTIVES, dense_loss, inputs

COMPLEMENT, PUBLISHED = OBJECTIVES[:2]
PLAUSIBLE = OBJECTIVES[5]
PRECISIONS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # and their tolerances
SHAPE = (3 * 47, 31, 123)  # nodes, width, vocabulary
CAPPED = {"scale": 0.5, "softcap": 3.0}
CASES: list[tuple[Objective, torch.dtype, tuple[int, int, int], dict[str, object]]] = [
    *((objective, dtype, SHAPE, {}) for objective in OBJECTIVES for dtype in PRECISIONS),
    *((COMPLEMENT, torch.float64, shape, {}) for shape in [(1, 1, 2), (3, 47, 31), (130, 16, 257)]),
    *((objective, torch.float32, SHAPE, head) for objective in OBJECTIVES[:2] for head in (CAPPED, {"bias": True})),
    (PUBLISHED, torch.bfloat16, (1, 1, 2), CAPPED),
    (OBJECTIVES[2], torch.bfloat16, (130, 16, 257), {"bias": True}),
]


def assert_fused_is_dense(
    hidden: Tensor,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    reference: Tensor | None,
    tolerance: float,
    gradient_tolerance: float | None = None,
    dense: torch.dtype | None = None,
    scale: float | None = None,
) -> None:
    """Value and gradient, the latter beside its largest or `scale`; the dense loss in a type of its own, if named."""
    dense = dense or hidden.dtype
    gradient_tolerance = gradient_tolerance or tolerance
    results = []
    for loss, dtype in ((fused_loss, hidden.dtype), (dense_loss, dense)):
        h = hidden.detach().to(dtype).clone().requires_grad_()
        bias = None if head.bias is None else head.bias.to(dtype)
        output = OutputHead(head.weight.to(dtype), bias=bias, scale=head.scale, softcap=head.softcap)
        losses = loss(h, output, counts, objective, None if reference is None else reference.to(dtype))
        (losses.loss * torch.linspace(0.5, 2, len(h))).sum().backward()
        assert h.grad is not None
        results.append((losses, h.grad.double()))
    (got, got_grad), (expected, expected_grad) = results
    for name in NodeLosses._fields:
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(expected, name).double(), rtol=tolerance, atol=tolerance
        )
    scale = max(scale or 1e-3, expected_grad.abs().max().item())
    torch.testing.assert_close(
        got_grad / scale, expected_grad / scale, rtol=gradient_tolerance, atol=gradient_tolerance
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one ragged."""
    monkeypatch.setattr(output_head, "TILE", 10)
    monkeypatch.setattr(output_head, "CHUNK", 64)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("objective", "dtype", "shape", "head"), CASES)
def test_fused_equals_dense(
    objective: Objective, dtype: torch.dtype, shape: tuple[int, int, int], head: dict[str, object]
) -> None:
    torch.manual_seed(0)
    if "bias" in head:
        head = {"bias": torch.randn(shape[2]).to(dtype)}
    hidden, output, counts, reference = inputs(shape, dtype, objective, **head)
    assert_fused_is_dense(hidden, output, counts, objective, reference, PRECISIONS[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("objective", OBJECTIVES[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_for_cuda_make_the_same_loss(
    objective: Objective, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = pytest.importorskip("buleyean_rl.kernels.triton")
    if torch.cuda.device_count():
        pytest.skip("not interpreted where there is a GPU: test_cuda has it there")
    monkeypatch.setattr(elementwise, "loss_passes", lambda _tile: passes)
    torch.manual_seed(0)
    hidden, output, counts, reference = inputs((47, 31, 123), dtype, objective, scale=0.5)
    assert_fused_is_dense(hidden, output, counts, objective, reference, PRECISIONS[dtype])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("objective", "shape", "drift"),  # drift of all the reference's logits
    [
        (COMPLEMENT, (47, 64, 1056), 3.0),
        (PUBLISHED, (530, 32, 512), 0.0),
        (OBJECTIVES[2], (1, 32, 64), 0.0),
        (PLAUSIBLE, (47, 64, 1056), 3.0),
    ],
)
def test_in_tiles_fused_is_dense(objective: Objective, shape: tuple[int, int, int], drift: float) -> None:
    torch.manual_seed(0)
    hidden, output, counts, reference = inputs(shape, torch.bfloat16, objective, scale=0.5)
    output.weight[:, 0] = 1
    if reference is not None:
        reference[:, 0] += 2 * drift
    assert matmul.head_softmax_available(output.weight)
    assert_fused_is_dense(hidden, output, counts, objective, reference, 1e-4, 1e-2, dense=torch.float64)


@pytest.mark.usefixtures("kernels")
def test_in_tiles_a_model_like_its_reference_has_no_gradient() -> None:
    hidden, output, counts, _ = inputs((40, 64, 512), torch.bfloat16, COMPLEMENT)
    none = Counts(*(x[:0] for x in (counts.node, counts.option, counts.count, counts.rounds)), counts.nodes)
    hidden.requires_grad_()
    losses = fused_loss(hidden, output, none, COMPLEMENT, hidden.detach().clone())
    losses.loss.sum().backward()
    torch.testing.assert_close(losses.loss, torch.zeros(40), rtol=0, atol=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("margin", "constants", "dtype"),
    [
        (5.0, {}, torch.float32),
        (14.0, {}, torch.float32),
        (26.0, {"tau": 8.0}, torch.float32),
        (26.0, {}, torch.float64),
        (26.0, {"tau": 8.0}, torch.float64),
        (26.0, {"tau": 8.0, "prior": Prior(0.5)}, torch.float64),
        (26.0, {"min_p": 0.1}, torch.float64),
        (14.0, {"min_p": 0.1}, torch.float32),
    ],
)
def test_a_model_that_is_sure_of_a_rejected_token(margin: float, constants: dict[str, Any], dtype: torch.dtype) -> None:
    """As in exact arithmetic: up to 1 - p = 1e-9, none in fp32, and to a target that weighs it 2e14 times less."""
    torch.manual_seed(2)
    weight = (torch.randn(200, 64) / 8).to(dtype)
    weight[:, :2], weight[3, :2] = 0, torch.tensor([margin, margin])  # token 3 stands out by the first two widths
    reference = torch.randn(4, 64).to(dtype)
    reference[:, 0], reference[:, 1] = 1, 0
    hidden = reference.clone()
    hidden[2:, 0] = 0.75  # some nodes have moved away from the reference
    counts = Counts(
        *torch.tensor([[0, 1, 1, 2], [3, 3, 7, 3]]), torch.tensor([60.0, 60, 2, 9]), torch.full((4,), 60.0), 4
    )
    objective = Objective(alpha=0.7, **({"min_p": 0.0} | constants))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6  # nats of a sum whose terms are logits of up to 26
    # the gradient is small where the model is sure; its rounding is that of a push along the margin
    scale = (1 - objective.alpha) * margin
    assert_fused_is_dense(
        hidden, OutputHead(weight), counts, objective, reference, tolerance, dense=torch.float64, scale=scale
    )


# --- what has no loss, what is never made


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_without_nodes_is_a_differentiable_zero(objective: Objective, dtype: torch.dtype) -> None:
    hidden, head, _, reference = inputs((3, 4, 7), dtype, objective)
    hidden.requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    losses = fused_loss(
        hidden[:0],
        head,
        Counts(nothing, nothing, nothing.float(), nothing.float(), 0),
        objective,
        None if reference is None else reference[:0],
    )
    losses.loss.sum().backward()
    assert losses.loss.sum() == 0
    assert [len(part) for part in losses] == [0] * 4
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_nodes_without_rejections_are_worth_their_kl_alone(objective: Objective) -> None:
    hidden, head, _, reference = inputs((5, 4, 7), torch.float64, objective)
    nothing = torch.zeros(0, dtype=torch.long)
    counts = Counts(nothing, nothing, nothing.double(), nothing.double(), 5)
    base = torch.full((5, 7), 1 / 7).double() if reference is None else head(reference).softmax(-1)
    losses = fused_loss(hidden, head, counts, objective, reference)
    kl = (base * (base.log() - head(hidden).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses.loss, objective.alpha * kl)
    assert not losses.contrast.any()
    assert not losses.floor.any()


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_a_node_does_not_notice_the_others(objective: Objective) -> None:
    hidden, head, counts, reference = inputs((9, 6, 31), torch.float64, objective)
    before = fused_loss(hidden, head, counts, objective, reference)
    others = hidden.clone()
    others[1:] = 50 * torch.randn(8, 6).double()
    after = fused_loss(others, head, counts, objective, reference)
    for name in NodeLosses._fields:
        assert getattr(before, name)[0] == pytest.approx(getattr(after, name)[0].item())


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
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


@pytest.mark.parametrize("objective", [COMPLEMENT, PUBLISHED, PLAUSIBLE])
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


@pytest.mark.parametrize(
    ("shape", "dtype", "head"),
    [
        *((SHAPE, dtype, {}) for dtype in PRECISIONS),
        ((1, 1, 2), torch.float64, {}),
        ((130, 16, 257), torch.float32, CAPPED),
    ],
)
def test_token_logprobs_are_those_of_the_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, head: dict[str, object]
) -> None:
    torch.manual_seed(0)
    hidden, output, _, _ = inputs(shape, dtype, COMPLEMENT, **head)
    tokens, grad = torch.randint(0, shape[2], shape[:1]), torch.randn(shape[0])
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = token_logprobs(ours, output, tokens)
    expected = output(theirs).log_softmax(-1).gather(1, tokens.unsqueeze(1))[:, 0]
    tolerance = PRECISIONS[dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for value in (got, expected):
        value.backward(grad.to(value.dtype))
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=tolerance)
