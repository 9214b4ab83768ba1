"""Ends a training run before it ruins the model, and keeps the last adapter that was sound.

    every few steps    neutral texts   --> KL(pi_ref || pi), entropy
    more seldom        a few prompts   --> share of greedy answers that loop
    a limit passed     the last sound adapter comes back, the run ends and says why

What is looked at, and when, depends on nothing but the data and the settings, so a run that was killed and resumed is
guarded at the same steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import Layout
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.repetition import loop_rate
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.packed_attention import PADDED, attending
from buleyean_rl.models.views import adapter_disabled, backbone, eval_mode, plain_model
from buleyean_rl.objectives.likelihood import compare_distributions

TEXTS, PROMPTS, ANSWER_TOKENS = 8, 16, 64
# Trained tokens between two looks: answers cost far more than reading the texts.
TOKENS_BETWEEN, TOKENS_BETWEEN_ANSWERS = 6_000, 40_000
SOUND = "sound.safetensors"


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
    """What a model looked like at a step.

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


def violated_limit(look: DriftCheck, base: DriftCheck, limits: Limits) -> str | None:
    """Which limit a model has passed, in words; None if none.

    Args:
        look: at the model.
        base: at the base model, its answers included.
        limits: how far it may go.
    """
    if not look.kl <= limits.kl:  # also where it is not a number
        return f"neutral text moved by KL {look.kl:.3f} nats per token, more than {limits.kl:g}"
    if not abs(look.entropy / base.entropy - 1) <= limits.entropy:
        return f"entropy of neutral text went from {base.entropy:.2f} to {look.entropy:.2f} nats per token"
    if look.loop_rate is not None and base.loop_rate is not None and look.loop_rate > base.loop_rate + limits.loops:
        return f"{look.loop_rate:.0%} of its answers loop, {base.loop_rate:.0%} of the base model's"
    return None


class Guard(TrainerCallback):
    """Looks at the model now and then, and ends the run where a limit is passed.

    Args:
        model: the PEFT model in training.
        tokenizer: its own.
        layout: as the trainer's.
        head: its output head.
        texts: neutral texts, as `evaluate.neutral_boundary` makes them.
        prompts: to be answered.
        tokens_a_step: how many an optimiser step trains on, about.
        folder: where the last sound adapter is kept.
        limits: how far the model may go.

    Attributes:
        base: the look at the base model, to be set before the run.
        looks: all those since.
        reason: why the run was ended; None if it was not.
        kept: the step whose adapter the model has, where the run was ended; 0 for the untrained one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        head: OutputHead,
        texts: Sequence[Boundary],
        prompts: Sequence[str],
        tokens_a_step: float,
        folder: Path,
        limits: Limits | None = None,
    ) -> None:
        self._model, self._head, self._limits = model, head, limits or Limits()
        self._engine = TransformersEngine(plain_model(model), tokenizer, batch=PROMPTS)
        self._prompts = list(prompts[-PROMPTS:]) if tokenizer.chat_template else []
        self._batch: Batch = layout(texts[:TEXTS]).to(plain_model(model).device)
        self._every = math.ceil(TOKENS_BETWEEN / tokens_a_step)
        self._every_answers = math.ceil(TOKENS_BETWEEN_ANSWERS / tokens_a_step / self._every) * self._every
        self._sound = folder / SOUND
        self._reference: Tensor | None = None
        self.base: DriftCheck | None = None
        self.looks: list[DriftCheck] = []
        self.reason: str | None = None
        self.kept: int | None = None

    @property
    def looks_at(self) -> list[Any]:
        """What a look depends on beside the model and the tokens of the texts."""
        return [TEXTS, ANSWER_TOKENS, self._prompts]

    def look(self, step: int, answers: bool) -> DriftCheck:
        """DriftCheck at the model as it is."""
        batch, entries = self._batch, self._batch.counts
        if self._reference is None:
            self._reference = reference_hidden(self._model, batch)[entries.node]
        with eval_mode(self._model), torch.no_grad():
            hidden = forward_hidden(backbone(self._model), batch)[entries.node]
            figures = compare_distributions(hidden, self._reference, self._head, entries.option)
            loops = loop_rate(self._answers()) if answers and self._prompts else None
        assert figures.kl is not None
        return DriftCheck(step, figures.kl.mean().item(), figures.entropy.mean().item(), loops)

    def objection(self, step: int, answers: bool = True) -> str | None:
        """Which limit the model has passed as it is, in words; None if none."""
        assert self.base is not None
        self.looks.append(self.look(step, answers))
        return violated_limit(self.looks[-1], self.base, self._limits)

    def look_at_base(self) -> DriftCheck:
        """DriftCheck at the model as if it had no adapter."""
        with adapter_disabled(self._model):
            return self.look(0, answers=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """DriftCheck at the model if it is time to."""
        step, last = state.global_step, state.global_step >= state.max_steps
        if step % self._every and not last:
            return
        self.reason = self.objection(step, answers=last or step % self._every_answers == 0)
        if self.reason is None:
            self._keep(step)
        else:
            self.kept = self.restore()
            control.should_training_stop = True

    def report(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        base = None if self.base is None else asdict(self.base)
        looks = [asdict(look) for look in self.looks]
        return {"limits": asdict(self._limits), "base": base, "looks": looks, "stopped": self.reason, "kept": self.kept}

    def _adapter(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _keep(self, step: int) -> None:
        temporary = self._sound.with_suffix(".tmp")
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._adapter().items()}
        save_file(tensors | {"step": torch.tensor(step)}, temporary)
        os.replace(temporary, self._sound)

    def restore(self) -> int:
        """Put the last sound adapter back; returns its step. Before the first there is the untrained one: B = 0."""
        sound = load_file(self._sound) if self._sound.exists() else None
        with torch.no_grad():
            for name, parameter in self._adapter().items():
                if sound is not None:
                    parameter.copy_(sound[name])
                elif "lora_B" in name:
                    parameter.zero_()
        return 0 if sound is None else int(sound["step"])

    def _answers(self) -> list[str]:
        """Greedy answers; their rows are padded, which the packed attention does not do."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in self._prompts]
        with attending(plain_model(self._model).config, PADDED):
            return self._engine.complete_many(conversations, Sampling(max_tokens=ANSWER_TOKENS))
