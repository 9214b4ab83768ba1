"""A thin Trainer: Hugging Face's loop around `fused_loss`.

    boundaries --deal, collate--> micro-batches --forward, twice with a reference--> hidden states --fused_loss--+
    all processes' gradients --sum--> step <-----------------------------------------------------------------------+

The reference is the same model with its adapter switched off, so there is never a second model in memory.
The loss itself knows nothing of this module. Of several processes each runs transformers' loop for one, over the same
records and with the same state; which of them it computes is dealt.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

from buleyean_rl.batching.batch import Batch, dropout_keys
from buleyean_rl.batching.forward import add_references, batch_losses
from buleyean_rl.batching.layout import ANCHOR_SHARE, make_batch
from buleyean_rl.batching.micro_batch import bin_pack
from buleyean_rl.data.token_store import boundary_sizes, count_answers
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import TrainingError
from buleyean_rl.models.dropout import dropout_keys_in_use
from buleyean_rl.models.gradient_buffer import GradientBuffer
from buleyean_rl.models.lora import cached_weights, linear_groups
from buleyean_rl.models.model import Model
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.objectives.losses import NodeLosses
from buleyean_rl.objectives.vocabulary_softmax import reference_softmax
from buleyean_rl.training.checkpoints import WriteCheckpoints
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit
from buleyean_rl.training.processes import Processes, deal
from buleyean_rl.training.reference_cache import CachedReference, ReferenceCache


class BuleyeanTrainer(Trainer):
    """Trains an adapter on void boundaries.

    Args:
        model: a `Model` with an adapter, or a PEFT model, its base frozen.
        args: the settings.
        train_dataset: what to train on.
        callbacks: as for `Trainer`.
        references: the reference's states from epoch to epoch, of the data set and then the anchors; None computes
            them each time.
        anchors: text that was not rejected, in groups: each step takes `args.anchors` of it for each of its records,
            from one group after the other.
    """

    args: BuleyeanConfig

    def __init__(
        self,
        model: Any,
        args: BuleyeanConfig,
        train_dataset: Sequence[Boundary],
        callbacks: Sequence[TrainerCallback] = (),
        references: ReferenceCache | None = None,
        anchors: Sequence[Sequence[Boundary]] = (),
    ) -> None:
        self.language_model = model if isinstance(model, Model) else Model.from_module(model)
        module = self.language_model.module
        self.layout, self.micro_batch_limit = self.language_model.layout, micro_batch_limit(args, module)
        arguments = copy(args)
        arguments.save_total_limit = None  # transformers would delete every folder named like a checkpoint
        self._processes = args.processes
        is_saved = args.save_strategy != "no"
        folder = Path(str(args.output_dir))
        checkpoints = WriteCheckpoints(folder, args.save_total_limit, is_saved, args.processes)
        self._boundaries = train_dataset
        super().__init__(
            module,
            arguments,
            data_collator=self._collate_share,
            train_dataset=_Numbers(len(train_dataset)),
            callbacks=[*callbacks, checkpoints],
        )
        self._train_batch_size = args.batch_records  # of the one process that transformers sees
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.head = self.language_model.head
        self._references = references
        self._groups = linear_groups(module)
        self._has_dropout = any(config.lora_dropout > 0 for config in module.peft_config.values())
        self._anchors = Anchors(len(train_dataset), anchors) if any(map(len, anchors)) and args.anchors else None
        self._sizes = boundary_sizes(train_dataset)
        rejected, accepted = (int(counts.sum()) for counts in count_answers(train_dataset))
        accepted += args.anchors * len(train_dataset) if self._anchors else 0
        self._anchor_weight = ANCHOR_SHARE * rejected / accepted if accepted else ANCHOR_SHARE
        self._gradients: GradientBuffer | None = None
        self._logged = _Totals()

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the base model's hidden states."""
        return self.args.loss.uses_reference

    @property
    def has_cache(self) -> bool:
        """Whether the base model's states are computed in the first epoch alone."""
        return self._references is not None

    @property
    def anchor_tokens(self) -> float:
        """Tokens of the anchors that a step takes for each record, on average."""
        return self.args.anchors * self._anchors.mean_size if self._anchors else 0.0

    def collate(self, numbered: Sequence[tuple[int, Boundary]]) -> dict[str, list[Batch]]:
        """Numbered boundaries to the input of one step: its micro-batches."""
        bins = bin_pack(numbered, lambda item: item[1].size, self.micro_batch_limit)
        return {"batches": [self._make_batch(members) for members in bins]}

    def _make_batch(self, numbered: Sequence[tuple[int, Boundary]]) -> Batch:
        boundaries = [boundary for _, boundary in numbered]
        batch = make_batch(self.layout, boundaries, self.args.loss, self._anchor_weight)
        batch = replace(batch, numbers=tuple(number for number, _ in numbered))
        return replace(batch, dropout_keys=dropout_keys(batch, boundaries)) if self._has_dropout else batch

    def _collate_share(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Numbers of a batch's records to the micro-batches of those that this process computes."""
        dealt = deal([self._sizes[number] for number in numbers], self._processes.size)
        share = [numbers[i] for i in dealt[self._processes.rank]]
        loads = [sum(self._sizes[numbers[i]] for i in hand) for hand in dealt]
        batches = self.collate([(number, self._boundaries[number]) for number in share])
        return batches | {"records": len(numbers), "loads": loads}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step with its anchors, and what its loss is divided by. See `Trainer.get_batch_samples`.

        Which anchors depends on the step alone, so a resumed run takes the same.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._anchors is not None:
            per_sample = self.args.anchors * self.args.batch_records
            for i, sample in enumerate(samples):
                first = (self.state.global_step * self.args.gradient_accumulation_steps + i) * per_sample
                anchors = self._anchors.take(first, self.args.anchors * sample["records"])
                dealt = deal([boundary.size for _, boundary in anchors], self._processes.size, sample["loads"])
                sample["batches"] += self.collate([anchors[i] for i in dealt[self._processes.rank]])["batches"]
        own = float(sum(batch.normaliser for sample in samples for batch in sample["batches"]))
        return samples, self._processes.sum(torch.tensor([own], dtype=torch.float64)).item()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Forward and backward, by micro-batches. See `Trainer.training_step`."""
        # transformers' own step would visit all modules for each micro-batch: 15 ms
        if not model.training:
            model.train()
        if self._gradients is not None:
            self._gradients.attach()
        loss = torch.zeros((), device=self.args.device)
        batches = inputs["batches"]
        with cached_weights(self._groups, self._gradients):
            for batch in self.with_references(batches) if self.uses_reference else batches:
                # backward too: a checkpointed layer is computed again there
                with segments_in_use(batch.segments), self._dropping(batch):
                    part = self.compute_loss(model, {"batch": batch}, num_items_in_batch=num_items_in_batch)
                    self.accelerator.backward(part)
                    loss += part.detach()
        if self._gradients is not None and self.accelerator.sync_gradients:
            self._processes.sum(self._gradients.flat)
        return loss

    def compute_loss(
        self,
        model: Any,  # noqa: ARG002 - the signature is transformers'
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """Weighted sum of a micro-batch's losses, over the normaliser of the step. See `Trainer.compute_loss`."""
        batch: Batch = inputs["batch"].to(self.args.device)
        losses = self.losses(batch)
        self._logged.add(losses, batch.tokens)
        weighted = losses.loss if batch.weights is None else losses.loss * batch.weights
        loss = weighted.sum() / float(num_items_in_batch or batch.normaliser)
        return (loss, losses) if return_outputs else loss

    @contextmanager
    def _dropping(self, batch: Batch) -> Iterator[None]:
        """Masks of dropout within go by the run's seed, the step and the record."""
        if not self._has_dropout:
            yield
            return
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((self.args.seed << 31) + self.state.global_step)
            keys = batch.dropout_keys
            with dropout_keys_in_use(None if keys is None else keys.to(device)):
                yield

    def losses(self, batch: Batch) -> NodeLosses:
        """The objective at each node of a batch."""
        return batch_losses(self.language_model.module, self.head, batch, self.args.loss)

    def with_references(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches with the base model's hidden states, from the cache if it has them."""
        cache = self._references
        cached = [cache.read(batch.numbers) if cache else None for batch in batches]
        completed = [
            replace(batch, reference=entry.states, reference_softmax=entry.softmax) if entry else batch
            for batch, entry in zip(batches, cached, strict=True)
        ]
        completed = add_references(self.language_model.module, [batch.to(self.args.device) for batch in completed])
        for i, batch in enumerate(completed):
            if cache and cached[i] is None and batch.reference is not None:
                softmax = reference_softmax(self.head, batch.reference, batch.counts) if cache.with_softmax else None
                cache.write(batch.numbers, CachedReference(batch.reference, softmax))
                completed[i] = replace(batch, reference_softmax=softmax)
        return completed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`."""
        self._logged = _Totals()  # the clock starts here
        if self.args.device.type == "cpu" or self._processes.size > 1:
            trained = [parameter for parameter in self.language_model.module.parameters() if parameter.requires_grad]
            self._gradients = GradientBuffer(trained, [group.parameters() for group in self._groups])
        try:
            return super().train(*args, **kwargs)
        finally:
            self._gradients = None

    def restore(self, checkpoint: Path) -> None:
        """Restore adapter and state of a checkpoint after which nothing is left to train."""
        weights = load_peft_weights(str(checkpoint), device=str(self.args.device))
        set_peft_model_state_dict(self.language_model.module, weights)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """The schedule from its second point on, as if there were one step more: its first and last have rate 0.

        See `Trainer.create_scheduler`.
        """
        if self.lr_scheduler is None:
            schedule: Any = super().create_scheduler(num_training_steps + 1, optimizer)
            factor = schedule.lr_lambdas[0]  # all groups of parameters have one schedule
            self.lr_scheduler = LambdaLR(schedule.optimizer, lambda step: factor(step + 1))
        return self.lr_scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        """See `Trainer._clip_grad_norm`; gradients in one tensor have their norm in one pass."""
        if self._gradients is None:
            return super()._clip_grad_norm(model)
        norm = torch.linalg.vector_norm(self._gradients.flat)
        factor = self.args.max_grad_norm / (norm + 1e-6)
        if factor < 1:
            self._gradients.flat.mul_(factor)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what transformers logs."""
        if "train_loss" in logs:
            return  # transformers' summary, of a resumed run that of the steps since: run.json has the run's
        if "loss" in logs:
            logs |= self._logged.means(self._processes)
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise TrainingError("the gradient is not a number: lower the learning rate")
            self._logged = _Totals()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter and tokenizer. transformers' own pickles the settings, and asks the Hub about the base."""
        folder = str(output_dir or self.args.output_dir)
        self.language_model.module.save_pretrained(folder, save_embedding_layers=False)
        # which safetensors lets nobody else read, whatever the umask
        shutil.copymode(Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors")
        if self.language_model.tokenizer is not None:
            self.language_model.tokenizer.save_pretrained(folder)


class _Numbers(Dataset[int]):
    """The numbers of a data set's items: who computes them reads them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


class Anchors:
    """Text that was not rejected, numbered behind a data set.

    Args:
        first: number of the first.
        groups: taken from one after the other; empty ones are left out.
    """

    def __init__(self, first: int, groups: Sequence[Sequence[Boundary]]) -> None:
        self._groups = [group for group in groups if len(group)]
        self._starts = list(accumulate(map(len, self._groups), initial=first))

    @property
    def mean_size(self) -> float:
        """Tokens of one, on average over the groups."""
        means = [sum(boundary.size for boundary in group) / len(group) for group in self._groups]
        return sum(means) / len(means)

    def take(self, first: int, count: int) -> list[tuple[int, Boundary]]:
        """The `first`-th and those after it, of an endless row of them, with their numbers."""
        taken = []
        for i in range(first, first + count):
            turn, group = divmod(i, len(self._groups))
            place = turn % len(self._groups[group])
            taken.append((self._starts[group] + place, self._groups[group][place]))
        return taken


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

    def means(self, processes: Processes) -> dict[str, float]:
        counts = torch.tensor([self.nodes, self.tokens], dtype=torch.float64)
        *sums, nodes, tokens = processes.sum(torch.cat([self.sums, counts])).tolist()
        loss, kl, contrast, floor = (total / max(nodes, 1) for total in sums)
        if not math.isfinite(loss):
            raise TrainingError("the loss is not a number: lower the learning rate")
        seconds = time.monotonic() - self.started
        parts = {"loss": loss, "kl": kl, "contrast": contrast, "floor": floor, "gap": loss - floor}
        return parts | {"tokens": int(tokens), "seconds": seconds}
