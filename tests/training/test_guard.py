"""The guard: its limits, that it ends a run there with the last sound adapter, and changes nothing otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.data.encode import Encoder
from buleyean_rl.errors import TrainingError
from buleyean_rl.evaluation.drift import Drift
from buleyean_rl.evaluation.neutral_text import neutral_boundary
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.training import guard as guarding
from buleyean_rl.training.config import load_config
from buleyean_rl.training.guard import DriftCheck, Guard, Limits, violated_limit
from buleyean_rl.training.processes import ALONE
from buleyean_rl.training.run import train
from quick import make_runs_quick
from tiny import SENTENCES, tiny_llama, tiny_tokenizer

LIMIT = 0.05  # which the first step stays within and a later one does not
STILL = Drift(0.0, 2.0, 2.0, 3.0, 3.0)
BASE = DriftCheck(0, {"own": STILL, "bundled": STILL}, 0.25)


def looked(kl: float = 0.0, entropy: float = 2.0, loops: float | None = None) -> DriftCheck:
    """A check at which only the bundled texts have moved."""
    return DriftCheck(5, {"own": STILL, "bundled": STILL._replace(kl=kl, entropy=entropy)}, loops)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (looked(0.1), None),
        (looked(0.1001), "bundled texts moved by KL 0.100"),
        (DriftCheck(5), "are not numbers any more"),
        (looked(0.05, 1.41), None),
        (looked(0.05, 1.39), "the entropy of bundled texts went from 2.00 to 1.39"),
        (looked(0.05, 2.61), "the entropy of bundled texts went from 2.00 to 2.61"),
        (looked(loops=0.5), None),
        (looked(loops=0.51), "51% of its answers loop, 25% of the base model's"),
    ],
)
def test_which_limit_is_violated(check: DriftCheck, words: str | None) -> None:
    reason = violated_limit(check, BASE, Limits(kl=0.1, entropy=0.3, loops=0.25))
    assert reason is None if words is None else reason is not None and words in reason


def make_guard(folder: Path, **settings: Any) -> Guard:
    tokenizer = tiny_tokenizer()
    model = Model.from_module(tiny_llama(tokenizer), tokenizer)
    model.attach_adapter(lora_config(4, 8, 0.0, None))
    texts = [boundary for text in SENTENCES[:4] if (boundary := neutral_boundary(Encoder(tokenizer, 16), text))]
    return Guard(model, {"own": texts[:1], "bundled": texts[1:]}, ["Hi", "And?"], 100.0, folder, **settings)


def test_a_check_has_the_kl_of_full_distributions(tmp_path: Path) -> None:
    guard = make_guard(tmp_path)
    model = guard._model
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        batch, head = guard._share(ALONE)._batch, model.head
        node = batch.counts.node
        log_ref = head(reference_hidden(model.module, batch)[node]).log_softmax(-1)
        log_pi = head(forward_hidden(model.backbone.eval(), batch)[node]).log_softmax(-1)
    check = guard.check(3, with_answers=True)
    first = guard._tokens["own"]
    kl, entropy = (log_ref.exp() * (log_ref - log_pi)).sum(-1), -(log_pi.exp() * log_pi).sum(-1)
    for kind, nodes in (("own", slice(first)), ("bundled", slice(first, None))):
        assert check.texts[kind].kl == pytest.approx(kl[nodes].mean().item(), rel=1e-4)
        assert check.texts[kind].entropy == pytest.approx(entropy[nodes].mean().item(), rel=1e-4)
    assert DriftCheck.from_json(check.as_json()) == check
    assert check.loop_rate in (0.0, 0.5, 1.0)
    assert guard.check(3, with_answers=False).loop_rate is None
    assert model.plain.config._attn_implementation == PACKED  # as before answering


@pytest.fixture
def check_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check after every step."""
    monkeypatch.setattr(guarding, "TOKENS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(guarding, "TOKENS_BETWEEN_ANSWERS", 1)
    monkeypatch.setattr(guarding, "MAX_ANSWER_TOKENS", 8)
    monkeypatch.setattr(guarding, "MAX_PROMPTS", 2)
    make_runs_quick(monkeypatch)


def largest(check: dict[str, Any]) -> float:
    return max(drift["kl"] for drift in check["texts"].values())


def run(base: Path, records: Path, folder: Path, **settings: Any) -> Any:
    fixed = {"max_steps": 8, "per_device_train_batch_size": 2, "warmup_steps": 0, "save_steps": 2}
    return train(records, str(base), load_config(None, folder, fixed | settings))


@pytest.mark.usefixtures("check_every_step")
def test_it_ends_a_run_and_restores_the_last_sound_adapter(base: Path, rejections: Path, tmp_path: Path) -> None:
    unheld = {"learning_rate": 1e-2, "anchors": 0, "min_p": 0.0}
    report = run(base, rejections, tmp_path / "wild", guard_kl=LIMIT, **unheld)
    seen = report.guard
    assert seen is not None
    assert "KL" in seen["stop_reason"]
    assert report.steps == seen["checks"][-1]["step"] < 8
    assert seen["restored_step"] == seen["checks"][-2]["step"]
    assert largest(seen["checks"][-1]) > LIMIT >= largest(seen["checks"][-2])
    names = {path.name for path in (tmp_path / "wild").iterdir()}
    assert not names & {"sound.safetensors", "settings.json"}

    # the restored adapter is that of a run that was stopped at that step, with the same learning rates
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop = state.global_step >= seen["restored_step"]

    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "warmup_steps": 0, "save_steps": 2}
    config = load_config(None, tmp_path / "short", settings | unheld | {"guard": False})
    train(rejections, str(base), config, callbacks=[Stop()])
    restored, short = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wild", "short"))
    for name, tensor in short.items():
        torch.testing.assert_close(restored[name], tensor, atol=0, rtol=0)


@pytest.mark.usefixtures("check_every_step")
def test_a_guarded_sound_run_has_the_same_bytes(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = run(base, rejections, tmp_path / "guarded", learning_rate=1e-4, guard_kl=10.0)
    monkeypatch.setattr(Guard, "check_base", None)  # the base's check is cached by now
    again = run(base, rejections, tmp_path / "again", learning_rate=1e-4, guard_kl=10.0)
    run(base, rejections, tmp_path / "alone", learning_rate=1e-4, guard=False)
    names = ("guarded", "again", "alone")
    one, two, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names)
    assert one == two
    assert (again.guard, again.drift) == (guarded.guard, guarded.drift)
    assert one == other
    assert guarded.guard is not None
    assert [check["step"] for check in guarded.guard["checks"]] == list(range(1, 9))
    assert (guarded.guard["stop_reason"], largest(guarded.guard["base"])) == (None, 0.0)
    assert json.loads((tmp_path / "alone" / "run.json").read_text())["guard"] is None


@pytest.mark.usefixtures("check_every_step")
def test_a_scale_that_violates_a_limit_is_not_applied(base: Path, rejections: Path, tmp_path: Path) -> None:
    run(base, rejections, tmp_path / "plain", learning_rate=1e-3, guard_kl=LIMIT)
    strong = run(base, rejections, tmp_path / "strong", learning_rate=1e-3, guard_kl=LIMIT, adapter_scale=30.0)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "strong"))
    assert one == other
    assert strong.adapter_scale == 1
    assert strong.guard is not None
    assert [check["step"] for check in strong.guard["checks"]] == [*range(1, 9), 8]
    assert largest(strong.guard["checks"][-1]) > LIMIT >= largest(strong.guard["checks"][-2])
    assert strong.guard["stop_reason"] is None


@pytest.mark.usefixtures("check_every_step")
def test_a_violation_at_the_first_check_is_an_error(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"first check, step 1: .* --no-guard"):
        run(base, rejections, tmp_path / "run", learning_rate=1.0)
