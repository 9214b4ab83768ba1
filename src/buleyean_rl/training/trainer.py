"""A thin Trainer: Hugging Face's loop around `fused_loss`.

    boundaries --collate--> Batch --forward, twice with a reference--> hidden states --fused_loss--> step

The reference is the same model with its adapter switched off, so there is never a second model in memory.
The loss itself knows nothing of this module.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.batching.layout import choose_layout, make_batch
from buleyean_rl.batching.rows import bin_pack
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import TrainingError
from buleyean_rl.models.gradient_buffer import GradientBuffer
from buleyean_rl.models.lora import groups_of, held
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import output_head
from buleyean_rl.objectives.losses import NodeLosses
from buleyean_rl.objectives.vocabulary_softmax import reference_softmax
from buleyean_rl.system.memory import freed_memory_retained
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit
from buleyean_rl.training.reference_cache import CachedReference, ReferenceCache


class BuleyeanTrainer(Trainer):
    """Trains an adapter on void boundaries.

    Args:
        model: a PEFT model, its base frozen.
        args: the settings.
        train_dataset: what to train on.
        tokenizer: saved beside the adapter, or None.
        callbacks: as for `Trainer`.
        references: what is kept of the reference from one epoch to the next; None for nothing.
    """

    args: BuleyeanConfig

    def __init__(
        self,
        model: Any,
        args: BuleyeanConfig,
        train_dataset: Sequence[Boundary],
        tokenizer: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        references: ReferenceCache | None = None,
    ) -> None:
        self._peft_model, self._tokenizer = model, tokenizer
        self.layout, self.micro_batch_limit = choose_layout(model), micro_batch_limit(args, model)
        super().__init__(
            model,
            args,
            data_collator=self.collate,
            train_dataset=_Numbered(train_dataset),
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.head = output_head(model)
        self._references = references
        self._groups = groups_of(model)
        self._gradients: GradientBuffer | None = None
        self._logged = _Totals()

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the base model's hidden states."""
        return self.args.loss.uses_reference

    def collate(self, numbered: Sequence[tuple[int, Boundary]]) -> dict[str, list[Batch]]:
        """Numbered boundaries to the input of one step: rows short enough for memory, long enough for speed."""
        rows = bin_pack(numbered, lambda item: item[1].size, self.micro_batch_limit)
        return {
            "batches": [
                replace(
                    make_batch(self.layout, [boundary for _, boundary in row], self.args.loss),
                    numbers=tuple(number for number, _ in row),
                )
                for row in rows
            ]
        }

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward, row by row. See `Trainer.training_step`."""
        # transformers' own step, row by row, would go through all the modules for each: 15 ms of a short row
        if not model.training:
            model.train()
        if self._gradients is not None:
            self._gradients.place()
        loss = torch.zeros((), device=self.args.device)
        batches = inputs["batches"]
        with held(self._groups, self._gradients):
            for batch in self.with_references(batches) if self.uses_reference else batches:
                with segments_in_use(batch.segments):  # backward too: a checkpointed layer is computed again there
                    of_row = self.compute_loss(model, {"batch": batch}, num_items_in_batch=num_items_in_batch)
                    self.accelerator.backward(of_row)
                    loss += of_row.detach()
        return loss

    def _find_gradients(self) -> GradientBuffer:
        learning = [parameter for parameter in self._peft_model.parameters() if parameter.requires_grad]
        return GradientBuffer(learning, [group.parameters() for group in self._groups])

    def _clip_grad_norm(self, model: Any) -> Any:
        """See `Trainer._clip_grad_norm`. Where gradients are in one tensor, of that: a hundredth of a step less."""
        if self._gradients is None:
            return super()._clip_grad_norm(model)
        norm = torch.linalg.vector_norm(self._gradients.all)
        factor = self.args.max_grad_norm / (norm + 1e-6)
        if factor < 1:
            self._gradients.all.mul_(factor)
        return norm

    def compute_loss(
        self,
        model: Any,  # noqa: ARG002 - the signature is transformers'
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the loss over the nodes of a row, over the nodes of the step. See `Trainer.compute_loss`."""
        batch: Batch = inputs["batch"].to(self.args.device)
        losses = self.losses(batch)
        self._logged.add(losses, batch.tokens)
        loss = losses.loss.sum() / max(int(num_items_in_batch or batch.terms), 1)
        return (loss, losses) if return_outputs else loss

    def losses(self, batch: Batch) -> NodeLosses:
        """The objective at each node of a batch."""
        return batch_losses(self._peft_model, self.head, batch, self.args.loss)

    def with_references(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches with the base model's hidden states, from the cache if it has them."""
        cache = self._references
        known = [cache.read(batch.numbers) if cache else None for batch in batches]
        read = [
            replace(batch, reference=found.states, rest=found.rest) if found else batch
            for batch, found in zip(batches, known, strict=True)
        ]
        completed = add_references(self._peft_model, [batch.to(self.args.device) for batch in read])
        for i, batch in enumerate(completed):
            if cache and known[i] is None and batch.reference is not None:
                rest = reference_softmax(self.head, batch.reference, batch.counts) if cache.with_rest else None
                cache.write(batch.numbers, CachedReference(batch.reference, rest))
                completed[i] = replace(batch, rest=rest)
        return completed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`."""
        self._logged = _Totals()  # the clock starts here
        if self.args.device.type == "cpu":
            self._gradients = self._find_gradients()
            self._peft_model.zero_grad = self._gradients.forget
        gc.freeze()  # what there is stays: the collector would go through all of it, over and over
        try:
            with freed_memory_retained():
                return super().train(*args, **kwargs)
        finally:
            gc.unfreeze()
            vars(self._peft_model).pop("zero_grad", None)
            self._gradients = None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:  # noqa: ARG002
        return sum(batch.terms for sample in batch_samples for batch in sample["batches"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what transformers logs."""
        if "loss" in logs:
            logs |= self._logged.means()
            self._logged = _Totals()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        # Not transformers' own: that pickles the arguments, and asks the Hub about the base model.
        folder = str(output_dir or self.args.output_dir)
        self._peft_model.save_pretrained(folder, save_embedding_layers=False)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)


class _Numbered(Dataset[tuple[int, Boundary]]):
    """A data set whose items know their place in it."""

    def __init__(self, boundaries: Sequence[Boundary]) -> None:
        self.boundaries = boundaries

    def __len__(self) -> int:
        return len(self.boundaries)

    def __getitem__(self, number: int) -> tuple[int, Boundary]:
        return number, self.boundaries[number]


class _Totals:
    """Sums of a loss and its parts since the last log."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(NodeLosses._fields), dtype=torch.float64)
        self.nodes = self.tokens = 0
        self.started = time.monotonic()

    def add(self, losses: NodeLosses, tokens: int) -> None:
        self.sums += torch.stack([part.detach().double().sum() for part in losses]).cpu()
        self.nodes += len(losses.loss)
        self.tokens += tokens

    def means(self) -> dict[str, float]:
        loss, kl, contrast, floor = (self.sums / max(self.nodes, 1)).tolist()
        if not math.isfinite(loss):
            raise TrainingError("the loss is not a number: lower the learning rate, or train in fp32")
        seconds = time.monotonic() - self.started
        parts = {"loss": loss, "kl": kl, "contrast": contrast, "floor": floor, "gap": loss - floor}
        return parts | {"tokens": self.tokens, "seconds": seconds}
