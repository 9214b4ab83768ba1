"""Ends a training run before it ruins the model, and restores the last adapter that was within the limits.

    every few steps    the base's own passages, bundled texts   --> KL(pi_ref || pi), entropy
    less often         a few prompts                            --> share of greedy answers that loop
    limit violated     the last sound adapter is restored, the run ends with the reason

The steps of the checks depend on the data and the settings only, so a resumed run is checked at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.drift import Drift, as_drifts, as_json, find_moved_text
from buleyean_rl.evaluation.repetition import loop_rate
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.models.packed_attention import PADDED
from buleyean_rl.models.private_interfaces import attending
from buleyean_rl.objectives.likelihood import TextFigures, compare_distributions
from buleyean_rl.system.files import atomic_write

MAX_TEXTS, MAX_PROMPTS, MAX_ANSWER_TOKENS = 8, 16, 64  # texts of each kind
# Trained tokens between two checks; answers take much longer than the texts.
TOKENS_BETWEEN_CHECKS, TOKENS_BETWEEN_ANSWERS = 6_000, 40_000
SOUND_ADAPTER_FILE = "sound.safetensors"


@dataclass(frozen=True)
class Limits:
    """Limits of a model's drift from its base.

    Args:
        kl: KL(pi_ref || pi) on each kind of text, nats per token.
        entropy: change of the entropy there, as a share of the base's.
        loops: rise of the share of answers that loop.
    """

    kl: float = 0.05
    entropy: float = 0.1
    loops: float = 0.25


@dataclass(frozen=True)
class DriftCheck:
    """A model's drift from its base at a step.

    Args:
        step: of the optimiser.
        texts: the drift of each kind of text; of none, where one is not a number.
        loop_rate: share of the prompts' greedy answers that loop; None without answers.
    """

    step: int
    texts: Mapping[str, Drift] = field(default_factory=dict)
    loop_rate: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {"step": self.step, "texts": as_json(self.texts), "loop_rate": self.loop_rate}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DriftCheck:
        """What `as_json` gave."""
        return cls(value["step"], as_drifts(value["texts"]), value["loop_rate"])


def violated_limit(check: DriftCheck, base: DriftCheck, limits: Limits) -> str | None:
    """The limit that a model violates, in words; None if it violates none.

    Args:
        check: of the model.
        base: of the base model, with answers.
        limits: of the drift.
    """
    if not check.texts:
        return "probabilities of plain text are not numbers any more"
    if moved := find_moved_text(check.texts, limits.kl, limits.entropy):
        return moved
    if check.loop_rate is not None and base.loop_rate is not None and check.loop_rate > base.loop_rate + limits.loops:
        return f"{check.loop_rate:.0%} of its answers loop, {base.loop_rate:.0%} of the base model's"
    return None


class Guard(TrainerCallback, ExportableState):
    """Checks the model's drift at intervals, and ends the run where a limit is violated.

    Args:
        model: in training.
        texts: by kind, as `neutral_text.neutral_boundary` makes them.
        prompts: for greedy answers.
        step_tokens: mean tokens of an optimiser step.
        folder: for the last sound adapter.
        limits: None for the defaults.

    Attributes:
        base: the check of the base model, set before the run.
        checks: of the run.
        stop_reason: why the guard ended the run; None if it did not.
        restored_step: step of the restored adapter, if the guard ended the run; 0 is the untrained one.
    """

    def __init__(
        self,
        model: Model,
        texts: Mapping[str, Sequence[Boundary]],
        prompts: Sequence[str],
        step_tokens: float,
        folder: Path,
        limits: Limits | None = None,
    ) -> None:
        self._model, self._limits = model, limits or Limits()
        self._prompts = list(prompts[-MAX_PROMPTS:]) if model.tokenizer.chat_template else []
        members = {kind: texts[kind][:MAX_TEXTS] for kind in texts}
        self._tokens = {kind: sum(len(text.tokens) for text in members[kind]) for kind in members}
        batch = LAYOUTS[model.layout]([text for kind in members.values() for text in kind])
        self._batch: Batch = batch.to(model.device)
        self._check_interval = math.ceil(TOKENS_BETWEEN_CHECKS / step_tokens)
        self._answer_interval = self._check_interval * math.ceil(
            TOKENS_BETWEEN_ANSWERS / step_tokens / self._check_interval
        )
        self._sound_file = folder / SOUND_ADAPTER_FILE
        self._reference: Tensor | None = None
        self.base: DriftCheck | None = None
        self.checks: list[DriftCheck] = []
        self.stop_reason: str | None = None
        self.restored_step: int | None = None

    @property
    def inputs(self) -> list[Any]:
        """What a check of the base depends on, besides the model and the texts' tokens."""
        return ["texts by kind", MAX_TEXTS, MAX_ANSWER_TOKENS, self._prompts]

    def tokens(self, steps: int) -> int:
        """Tokens that its checks read and write in a run of some steps."""
        checks, answers = (-(-steps // interval) for interval in (self._check_interval, self._answer_interval))
        return checks * sum(self._tokens.values()) + answers * len(self._prompts) * MAX_ANSWER_TOKENS

    def check(self, step: int, with_answers: bool) -> DriftCheck:
        """Measure the drift of the model as it is."""
        batch, entries = self._batch, self._batch.counts
        if self._reference is None:
            self._reference = reference_hidden(self._model.module, batch)[entries.node]
        with self._model.eval_mode(), torch.no_grad():
            hidden = forward_hidden(self._model.backbone, batch)[entries.node]
            figures = compare_distributions(hidden, self._reference, self._model.head, entries.option)
            kinds = zip(*(part.split([*self._tokens.values()]) for part in _drift_parts(figures)), strict=True)
            drifts = [Drift(*(part.mean().item() for part in parts)) for parts in kinds]
            is_finite = all(math.isfinite(figure) for drift in drifts for figure in drift)
            loops = loop_rate(self._answer_prompts()) if with_answers and self._prompts and is_finite else None
        return DriftCheck(step, dict(zip(self._tokens, drifts, strict=True)) if is_finite else {}, loops)

    def check_base(self) -> DriftCheck:
        """Measure the model with its adapter disabled; the KL is zero."""
        with self._model.adapter_disabled():
            return self.check(0, with_answers=True)

    def find_violation(self, step: int, with_answers: bool = True) -> str | None:
        """Check the model as it is: the limit that it violates, in words, or None."""
        assert self.base is not None
        self.checks.append(self.check(step, with_answers))
        return violated_limit(self.checks[-1], self.base, self._limits)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "checks": [check.as_json() for check in self.checks],
            "stop_reason": self.stop_reason,
            "restored_step": self.restored_step,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds of it. See `state`."""
        self.checks = [DriftCheck.from_json(check) for check in state["checks"]]
        self.stop_reason, self.restored_step = state["stop_reason"], state["restored_step"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Check the model at the end of an interval and of the run."""
        step = state.global_step
        last = step >= state.max_steps or control.should_training_stop
        if step % self._check_interval and not last:
            return
        self.stop_reason = self.find_violation(step, with_answers=last or step % self._answer_interval == 0)
        if self.stop_reason is None:
            self._save_sound(step)
        else:
            self.restored_step = self.restore()
            control.should_training_stop = True

    def report(self) -> dict[str, Any]:
        """The entry of `run.json`."""
        return {
            "limits": asdict(self._limits),
            "base": None if self.base is None else self.base.as_json(),
            **self.state(),
        }

    def restore(self) -> int:
        """Restore the last sound adapter, or before the first the untrained one, B = 0; returns its step."""
        sound = load_file(self._sound_file) if self._sound_file.exists() else None
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
        with atomic_write(self._sound_file) as file:
            file.write(save(tensors | {"step": torch.tensor(step)}))

    def _answer_prompts(self) -> list[str]:
        """Greedy answers, with padded attention: generation does not pack. Keys and values are freed afterwards."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in self._prompts]
        with attending(self._model.plain.config, PADDED):
            engine = TransformersEngine(self._model.plain, self._model.tokenizer, batch=MAX_PROMPTS)
            return engine.complete_many(conversations, Sampling(max_tokens=MAX_ANSWER_TOKENS))


def _drift_parts(figures: TextFigures) -> list[Tensor]:
    """The fields of `Drift` at each node. Shapes: (nodes,)."""
    parts = (figures.kl, figures.reference_entropy, figures.entropy, figures.reference_nll, figures.nll)
    return [part for part in parts if part is not None]
