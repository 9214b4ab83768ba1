"""Ends a training run before it ruins the model, and restores the last adapter that was within the limits.

    every few steps    the base's own passages, bundled texts   --> KL(pi_ref || pi), entropy
    less often         a few prompts                            --> share of greedy answers that loop
    limit violated     the last sound adapter is restored, the run ends with the reason

The steps of the checks depend on the data and the settings only, so a resumed run is checked at the same steps. Of
several processes each measures its part of the texts and answers its part of the prompts.
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
from buleyean_rl.training.processes import ALONE, Processes, deal

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
        processes: that train together.

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
        processes: Processes = ALONE,
    ) -> None:
        self._model, self._limits, self._processes = model, limits or Limits(), processes
        self._prompts = list(prompts[-MAX_PROMPTS:]) if model.tokenizer.chat_template else []
        self._texts = {kind: texts[kind][:MAX_TEXTS] for kind in texts}
        self._tokens = {kind: sum(len(text.tokens) for text in members) for kind, members in self._texts.items()}
        self._check_interval = math.ceil(TOKENS_BETWEEN_CHECKS / step_tokens)
        self._answer_interval = self._check_interval * math.ceil(
            TOKENS_BETWEEN_ANSWERS / step_tokens / self._check_interval
        )
        self._sound_file = folder / SOUND_ADAPTER_FILE
        self._shares: dict[int, _Share] = {}  # by the number of processes
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

    def check(self, step: int, with_answers: bool, processes: Processes | None = None) -> DriftCheck:
        """Measure the drift of the model as it is.

        Args:
            step: of the run.
            with_answers: whether prompts are answered too.
            processes: that measure it together; None for those that train.
        """
        together = processes or self._processes
        with self._model.eval_mode(), torch.no_grad():
            sums = together.sum(self._share(together).drift_sums(self._model)) / self._token_counts
            is_finite = bool(sums.isfinite().all())
            loops = self._loop_rate(together) if with_answers and self._prompts and is_finite else None
        drifts = [Drift(*figures) for figures in sums.tolist()]
        return DriftCheck(step, dict(zip(self._tokens, drifts, strict=True)) if is_finite else {}, loops)

    def check_base(self) -> DriftCheck:
        """Measure the model with its adapter disabled, in this process alone; the KL is zero."""
        with self._model.adapter_disabled():
            return self.check(0, with_answers=True, processes=ALONE)

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
        # a caller's callbacks are in the first process alone
        last = step >= state.max_steps or self._processes.once(lambda: control.should_training_stop)
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
        adapter = self._adapter()
        sound = load_file(self._sound_file) if self._sound_file.exists() else None
        with torch.no_grad():
            for name, parameter in adapter.items():
                if sound is not None:
                    parameter.copy_(sound[name])
                elif "lora_B" in name:
                    parameter.zero_()
        self._processes.copy([*adapter.values()])
        return self._processes.once(lambda: 0 if sound is None else int(sound["step"]))

    def _adapter(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.module.named_parameters() if p.requires_grad}

    def _save_sound(self, step: int) -> None:
        if not self._processes.is_first:
            return
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._adapter().items()}
        with atomic_write(self._sound_file) as file:
            file.write(save(tensors | {"step": torch.tensor(step)}))

    @property
    def _token_counts(self) -> Tensor:
        return torch.tensor([*self._tokens.values()], dtype=torch.float64).unsqueeze(1)

    def _share(self, processes: Processes) -> _Share:
        """The texts that this process measures."""
        if processes.size not in self._shares:
            texts = [(kind, text) for kind, members in self._texts.items() for text in members]
            dealt = deal([len(text.tokens) for _, text in texts], processes.size)[processes.rank]
            self._shares[processes.size] = _Share([texts[i] for i in dealt], [*self._texts], self._model)
        return self._shares[processes.size]

    def _loop_rate(self, processes: Processes) -> float:
        """Share of the prompts' answers that loop."""
        answers = self._answer_prompts(self._prompts[processes.rank :: processes.size])
        return loop_rate([answer for some in processes.all(answers) for answer in some])

    def _answer_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers, with padded attention: generation does not pack. Keys and values are freed afterwards."""
        if not prompts:
            return []
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        with attending(self._model.plain.config, PADDED):
            engine = TransformersEngine(self._model.plain, self._model.tokenizer, batch=MAX_PROMPTS)
            return engine.complete_many(conversations, Sampling(max_tokens=MAX_ANSWER_TOKENS))


class _Share:
    """Some texts, with the base model's states.

    Args:
        texts: each with its kind.
        kinds: all there are.
        model: in training.
    """

    def __init__(self, texts: Sequence[tuple[str, Boundary]], kinds: Sequence[str], model: Model) -> None:
        self._rows = len(kinds)
        places = [kinds.index(kind) for kind, _ in texts]
        self._row = torch.tensor(places).repeat_interleave(torch.tensor([len(text.tokens) for _, text in texts]))
        self._batch: Batch | None = None
        if texts:
            self._batch = LAYOUTS[model.layout]([text for _, text in texts]).to(model.device)
            self._reference = reference_hidden(model.module, self._batch)[self._batch.counts.node]

    def drift_sums(self, model: Model) -> Tensor:
        """The fields of `Drift`, summed over the nodes of each kind. Shape: (kinds, fields), fp64."""
        sums = torch.zeros(self._rows, len(Drift._fields), dtype=torch.float64)
        if self._batch is None:
            return sums
        entries = self._batch.counts
        hidden = forward_hidden(model.backbone, self._batch)[entries.node]
        figures = compare_distributions(hidden, self._reference, model.head, entries.option)
        parts = torch.stack([part.double().cpu() for part in _drift_parts(figures)], dim=1)
        return sums.index_add_(0, self._row, parts)


def _drift_parts(figures: TextFigures) -> list[Tensor]:
    """The fields of `Drift` at each node. Shapes: (nodes,)."""
    parts = (figures.kl, figures.reference_entropy, figures.entropy, figures.reference_nll, figures.nll)
    return [part for part in parts if part is not None]
