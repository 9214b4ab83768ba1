"""Ends a training run before it ruins the model, and restores the last adapter that was within the limits.

    every few steps    neutral texts   --> KL(pi_ref || pi), entropy
    more seldom        a few prompts   --> share of greedy answers that loop
    a limit violated   the last sound adapter is restored, the run ends and says why

What is checked, and when, depends on nothing but the data and the settings, so a run that was killed and resumed is
checked at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.repetition import loop_rate
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.models.packed_attention import PADDED
from buleyean_rl.models.private_interfaces import attending
from buleyean_rl.objectives.likelihood import compare_distributions
from buleyean_rl.system.files import atomic_write

TEXTS, PROMPTS, ANSWER_TOKENS = 8, 16, 64
# Trained tokens between two checks: answers cost far more than reading the texts.
TOKENS_BETWEEN, TOKENS_BETWEEN_ANSWERS = 6_000, 40_000
SOUND_ADAPTER = "sound.safetensors"


@dataclass(frozen=True)
class Limits:
    """How far a model may go from its base.

    Args:
        kl: KL(pi_ref || pi) on neutral texts, nats per token.
        entropy: change of the entropy there, as a share of the base's.
        loops: rise of the share of answers that loop.
    """

    kl: float = 0.5
    entropy: float = 0.5
    loops: float = 0.25


@dataclass(frozen=True)
class DriftCheck:
    """How far a model is from its base at a step.

    Args:
        step: of the optimiser.
        kl: KL(pi_ref || pi) on the neutral texts, nats per token.
        entropy: on the neutral texts, nats per token.
        loop_rate: share of the prompts' greedy answers that loop; None if nothing was answered.
    """

    step: int
    kl: float
    entropy: float
    loop_rate: float | None = None


def violated_limit(check: DriftCheck, base: DriftCheck, limits: Limits) -> str | None:
    """Which limit a model violates, in words; None if none.

    Args:
        check: of the model.
        base: of the base model, its answers included.
        limits: how far it may go.
    """
    if not check.kl <= limits.kl:  # also where it is not a number
        return f"neutral text moved by KL {check.kl:.3f} nats per token, more than {limits.kl:g}"
    if not abs(check.entropy / base.entropy - 1) <= limits.entropy:
        return f"entropy of neutral text went from {base.entropy:.2f} to {check.entropy:.2f} nats per token"
    if check.loop_rate is not None and base.loop_rate is not None and check.loop_rate > base.loop_rate + limits.loops:
        return f"{check.loop_rate:.0%} of its answers loop, {base.loop_rate:.0%} of the base model's"
    return None


class Guard(TrainerCallback):
    """Checks the model now and then, and ends the run where a limit is violated.

    Args:
        model: in training.
        texts: neutral texts, as `neutral_text.neutral_boundary` makes them.
        prompts: to be answered.
        step_tokens: how many an optimiser step trains on, about.
        folder: where the last sound adapter is saved.
        limits: how far the model may go.

    Attributes:
        base: the check of the base model, to be set before the run.
        checks: all those since.
        stop_reason: why the run was ended; None if it was not.
        restored_step: the step whose adapter the model has, where the run was ended; 0 for the untrained one.
    """

    def __init__(
        self,
        model: Model,
        texts: Sequence[Boundary],
        prompts: Sequence[str],
        step_tokens: float,
        folder: Path,
        limits: Limits | None = None,
    ) -> None:
        self._model, self._limits = model, limits or Limits()
        self._engine = TransformersEngine(model.plain, model.tokenizer, batch=PROMPTS)
        self._prompts = list(prompts[-PROMPTS:]) if model.tokenizer.chat_template else []
        self._batch: Batch = LAYOUTS[model.layout](texts[:TEXTS]).to(model.device)
        self._every = math.ceil(TOKENS_BETWEEN / step_tokens)
        self._every_answers = math.ceil(TOKENS_BETWEEN_ANSWERS / step_tokens / self._every) * self._every
        self._sound = folder / SOUND_ADAPTER
        self._reference: Tensor | None = None
        self.base: DriftCheck | None = None
        self.checks: list[DriftCheck] = []
        self.stop_reason: str | None = None
        self.restored_step: int | None = None

    @property
    def inputs(self) -> list[Any]:
        """What a check of the base depends on beside the model and the tokens of the texts."""
        return [TEXTS, ANSWER_TOKENS, self._prompts]

    def check(self, step: int, with_answers: bool) -> DriftCheck:
        """The drift of the model as it is."""
        batch, entries = self._batch, self._batch.counts
        if self._reference is None:
            self._reference = reference_hidden(self._model.module, batch)[entries.node]
        with self._model.eval_mode(), torch.no_grad():
            hidden = forward_hidden(self._model.backbone, batch)[entries.node]
            figures = compare_distributions(hidden, self._reference, self._model.head, entries.option)
            loops = loop_rate(self._answers()) if with_answers and self._prompts else None
        assert figures.kl is not None
        return DriftCheck(step, figures.kl.mean().item(), figures.entropy.mean().item(), loops)

    def check_base(self) -> DriftCheck:
        """The drift of the model with its adapter off: its KL is zero."""
        with self._model.adapter_disabled():
            return self.check(0, with_answers=True)

    def find_violation(self, step: int, with_answers: bool = True) -> str | None:
        """Which limit the model violates as it is, in words; None if none."""
        assert self.base is not None
        self.checks.append(self.check(step, with_answers))
        return violated_limit(self.checks[-1], self.base, self._limits)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Check the model if it is time to."""
        step, last = state.global_step, state.global_step >= state.max_steps
        if step % self._every and not last:
            return
        self.stop_reason = self.find_violation(step, with_answers=last or step % self._every_answers == 0)
        if self.stop_reason is None:
            self._save_sound(step)
        else:
            self.restored_step = self.restore()
            control.should_training_stop = True

    def report(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        return {
            "limits": asdict(self._limits),
            "base": None if self.base is None else asdict(self.base),
            "checks": [asdict(check) for check in self.checks],
            "stop_reason": self.stop_reason,
            "restored_step": self.restored_step,
        }

    def restore(self) -> int:
        """Restore the last sound adapter; returns its step. Before the first there is the untrained one: B = 0."""
        sound = load_file(self._sound) if self._sound.exists() else None
        with torch.no_grad():
            for name, parameter in self._adapter().items():
                if sound is not None:
                    parameter.copy_(sound[name])
                elif "lora_B" in name:
                    parameter.zero_()
        return 0 if sound is None else int(sound["step"])

    def _adapter(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.module.named_parameters() if p.requires_grad}

    def _save_sound(self, step: int) -> None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._adapter().items()}
        with atomic_write(self._sound) as file:
            file.write(save(tensors | {"step": torch.tensor(step)}))

    def _answers(self) -> list[str]:
        """Greedy answers; in generation sequences are padded, which the packed attention does not do."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in self._prompts]
        with attending(self._model.plain.config, PADDED):
            return self._engine.complete_many(conversations, Sampling(max_tokens=ANSWER_TOKENS))
