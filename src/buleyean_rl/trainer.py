"""A thin Trainer: Hugging Face's loop around `fused_loss`.

    boundaries --collate--> Batch --forward, twice with a reference--> hidden states --fused_loss--> step

The reference is the same model with its adapter switched off, so there is never a second model in memory.
The loss itself knows nothing of this module.
"""

from __future__ import annotations

import gc
import heapq
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from buleyean_rl.allocator import free_memory_kept
from buleyean_rl.attention import PACKED, segments_in_use
from buleyean_rl.batches import Answers, Batch, find_answers, forward_hidden, join_rows, pack, pad_paths
from buleyean_rl.boundary import Boundary
from buleyean_rl.errors import TrainingError, UsageError
from buleyean_rl.fused import fused_loss, token_logprobs
from buleyean_rl.gradients import Gradients
from buleyean_rl.head import OutputHead
from buleyean_rl.lora import groups_of, held
from buleyean_rl.losses import NodeLosses, Objective, ObjectiveName, listwise_loss
from buleyean_rl.models import backbone, base_alone, evaluating, output_head, plain_model
from buleyean_rl.reference import Known, ReferenceCache
from buleyean_rl.softmax import rest_of

# Tokens a forward pass takes at a time, unless one record has more. The loss of a step is a sum over its records, so
# it does not matter to the result; memory grows with it, and below some 500 the matrix products slow down. In bf16
# a row holds two records of 512, and a short one.
ROW_TOKENS = 1280
GPU_FACTOR = 25
REFERENCE_TOKENS = 3 * ROW_TOKENS  # without a gradient a row's memory is little

PROBE_RUNS = [7, 6, 6, 7]  # nodes of `probe`

T = TypeVar("T")
Layout = Callable[[Sequence[Boundary]], Batch]


@dataclass
class BuleyeanConfig(TrainingArguments):
    """Every setting of a training run: transformers' `TrainingArguments`, and these.

    Args:
        objective: `ratio` or `complement` to learn from rejections, `listwise` to learn a ranking of whole answers,
            `published` to reproduce the published loss.
        alpha: weight of the KL to the complement distribution, the contrast has the rest; None for what the
            objective does best with: 0.9 for `ratio`, 0.7 for the others.
        tau: strength of the complement weights; 1 is the published formula.
        beta: how far a ranking may move the answers' likelihoods; only `listwise` has it.
        own_samples: answers of the base model's own that `listwise` puts beside the rejected ones of a prompt.
        max_length: most tokens of a prompt and one response; longer responses are cut.
        row_tokens: how many tokens go through the model at a time, see `row_tokens`; None for what suits the device.
        held_out: share of the records kept from training, to measure on.
        lora_rank: rank of the adapter.
        lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
        lora_dropout: on the adapter's input.
        lora_targets: names of the adapted layers; None for every linear layer.
        strength: what the adapter adds to the weights is multiplied by it once it is trained (ExPO, arXiv:2404.16792).
        guard: end the run before it ruins the model.
        guard_kl: how far neutral text may move, KL(pi_ref || pi) in nats per token.
    """

    objective: ObjectiveName = "ratio"
    alpha: float | None = None
    tau: float = 1.0
    beta: float = 0.1
    own_samples: int = 2
    max_length: int = 1024
    row_tokens: int | None = None
    held_out: float = 0.1
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] | None = None
    strength: float = 1.0
    guard: bool = True
    guard_kl: float = 0.5

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.0888, metadata={"help": "Below 1, a share: 100 of 1125 steps."})
    per_device_train_batch_size: int = 4
    num_train_epochs: float = 1.0
    logging_steps: float = 1
    save_steps: float = 0.1
    save_total_limit: int | None = 1
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("max_length", self.max_length, self.max_length >= 2),
            ("row_tokens", self.row_tokens, self.row_tokens is None or self.row_tokens >= 1),
            ("held_out", self.held_out, 0 <= self.held_out < 1),
            ("own_samples", self.own_samples, self.own_samples >= 0),
            ("lora_rank", self.lora_rank, self.lora_rank >= 1),
            ("lora_alpha", self.lora_alpha, self.lora_alpha > 0),
            ("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1),
            ("strength", self.strength, 0 < self.strength < math.inf),
            ("guard_kl", self.guard_kl, self.guard_kl > 0),
            ("learning_rate", self.learning_rate, self.learning_rate > 0),
            ("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0),
            (
                "per_device_train_batch_size",
                self.per_device_train_batch_size,
                self.per_device_train_batch_size >= 1,
            ),
        ):
            if not fits:
                raise UsageError(f"{name} cannot be {value}")
        if self.alpha is None:
            self.alpha = 0.9 if self.objective == "ratio" else 0.7
        self.loss = Objective(self.objective, self.alpha, self.tau, self.beta)
        self.use_cpu |= not torch.cuda.is_available()  # Apple's GPU has no fp64, which the loss and its floor need
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one device: replicas would bypass the adapter switch


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
        self.layout, self.row_limit = choose_layout(model), row_limit(args, model)
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
        self._gradients: Gradients | None = None
        self._logged = _Totals()

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the base model's hidden states."""
        return self.args.loss.uses_reference

    def collate(self, numbered: Sequence[tuple[int, Boundary]]) -> dict[str, list[Batch]]:
        """Numbered boundaries to the input of one step: rows short enough for memory, long enough for speed."""
        rows = fill_rows(numbered, lambda item: item[1].size, self.row_limit)
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

    def _find_gradients(self) -> Gradients:
        learning = [parameter for parameter in self._peft_model.parameters() if parameter.requires_grad]
        return Gradients(learning, [group.parameters() for group in self._groups])

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
                rest = rest_of(self.head, batch.reference, batch.counts) if cache.with_rest else None
                cache.write(batch.numbers, Known(batch.reference, rest))
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
            with free_memory_kept():
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


def row_limit(config: BuleyeanConfig, model: Any) -> int:
    """Tokens of a row of training: as asked for, or what suits the model."""
    return config.row_tokens or row_tokens(model)


def row_tokens(model: Any) -> int:
    """Tokens a row of a model may have: half as many where it is in fp32, more on a GPU."""
    plain = plain_model(model)
    in_bf16 = ROW_TOKENS * (GPU_FACTOR if plain.device.type == "cuda" else 1)
    return int(in_bf16 * torch.bfloat16.itemsize // plain.dtype.itemsize)


def fill_rows(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Items in few rows, each short enough for memory, and no longer than it has to be.

    How many rows it takes is found with the longest items first, each where it leaves the least room. If each can be
    put in the shortest row as well, that is what they are, as a row that is longer takes more memory.

    Args:
        items: what is to be laid out.
        size: how many tokens an item has; one with more than a row has a row to itself.
        limit: tokens of a row, see `row_tokens`.
    """
    rows: list[list[T]] = []
    rooms: list[int] = []
    longest_first = sorted(items, key=size, reverse=True)
    for item in longest_first:
        fitting = [row for row, room in enumerate(rooms) if size(item) <= room]
        if not fitting:
            rows.append([])
            rooms.append(limit)
        row = min(fitting, key=rooms.__getitem__, default=-1)
        rows[row].append(item)
        rooms[row] -= size(item)
    even: list[list[T]] = [[] for _ in rows]
    shortest = [(0, row) for row in range(len(rows))]  # a heap
    for item in longest_first:
        tokens, row = heapq.heappop(shortest)
        even[row].append(item)
        heapq.heappush(shortest, (tokens + size(item), row))
    longest = max(shortest, default=(0, 0))[0]
    return even if longest <= max([limit, *map(size, longest_first[:1])]) else rows


def make_batch(layout: Layout, boundaries: Sequence[Boundary], objective: Objective) -> Batch:
    """Boundaries in a layout, with the nodes that the objective has a loss at."""
    batch = layout(boundaries)
    if objective.of_answers:
        return replace(batch, answers=find_answers(boundaries))
    return batch if objective.uses_reference else batch.without_anchors()


class _Numbered(Dataset[tuple[int, Boundary]]):
    """A data set whose items know their place in it."""

    def __init__(self, boundaries: Sequence[Boundary]) -> None:
        self.boundaries = boundaries

    def __len__(self) -> int:
        return len(self.boundaries)

    def __getitem__(self, number: int) -> tuple[int, Boundary]:
        return number, self.boundaries[number]


def batch_losses(model: Any, head: OutputHead, batch: Batch, objective: Objective) -> NodeLosses:
    """The objective at each node of a batch.

    Args:
        model: a PEFT model; a plain one will do where the objective uses no reference.
        head: its output head.
        batch: in the layout the model was prepared for.
        objective: which loss.
    """
    if objective.uses_reference:
        (batch,) = add_references(model, [batch])
    return losses_of_states(forward_hidden(backbone(model), batch), head, batch, objective)


def losses_of_states(hidden: Tensor, head: OutputHead, batch: Batch, objective: Objective) -> NodeLosses:
    """The objective from the hidden states at a batch's nodes.

    Args:
        hidden: the model's. Shape: (nodes, width).
        head: the output head.
        batch: whose nodes they are, with the reference where the objective uses it.
        objective: which loss.
    """
    reference = batch.reference
    if batch.answers is None or reference is None:
        return fused_loss(hidden, head, batch.counts, objective, reference, batch.rest)
    ratios = answer_logprobs(hidden, head, batch.answers) - answer_logprobs(reference, head, batch.answers)
    return listwise_loss(ratios, batch.answers.counts, objective)


def answer_logprobs(hidden: Tensor, head: OutputHead, answers: Answers) -> Tensor:
    """Log-probability of each answer.

    Args:
        hidden: at the nodes of a batch. Shape: (nodes, width).
        head: the output head.
        answers: of the batch.

    Returns:
        In nats, without that of ending there. Shape: (answers,).
    """
    return answers.sum(token_logprobs(hidden[answers.parent], head, answers.token))


def probe(vocabulary: int) -> list[Boundary]:
    """Two records, the first with three branches: two from the end of its prompt, one from within the first branch.

    Their tokens are from the middle of the vocabulary: at its beginning are often those that control a chat, whose
    states in bf16 are mostly noise.
    """
    first = vocabulary // 2
    tokens = [(first + i) % vocabulary for i in range(38)]
    return [
        Boundary(tokens[:8], tokens[8:26], [0, 6, 12], [0, 0, 3], [(0, tokens[8], 1)], 1),
        Boundary(tokens[26:32], tokens[32:], [0], [0], [(0, tokens[32], 1)], 1),
    ]


def choose_layout(model: Any) -> Layout:
    """`pack` if the model's attention can be replaced and the result is the same, else `pad_paths`.

    The model is left with the attention its layout needs.
    """
    plain = plain_model(model)
    own_attention = plain.config._attn_implementation
    records = probe(plain.get_input_embeddings().num_embeddings)
    try:
        with evaluating(model), torch.no_grad():
            padded = forward_hidden(backbone(model), pad_paths(records).to(plain.device)).float()
            plain.set_attn_implementation(PACKED)
            packed = forward_hidden(backbone(model), pack(records).to(plain.device)).float()
        # In bf16 single nodes may differ by half; a wrong mask moves most nodes of a run.
        differences = (packed - padded).norm(dim=1) / padded.norm(dim=1)
        if all(run.median() < 0.1 for run in differences.split(PROBE_RUNS)):
            return pack
    except (ValueError, RuntimeError, NotImplementedError):
        pass  # a model that cannot be packed is not an error: there is the padded layout
    plain.set_attn_implementation(own_attention)
    return pad_paths


def reference_hidden(model: Any, batch: Batch) -> Tensor:
    """The frozen base model's hidden states at a batch's nodes: the adapter off, dropout off."""
    with base_alone(model), torch.no_grad():
        return forward_hidden(backbone(model), batch)


def add_references(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    """Batches with `reference_hidden`, where they are without; packed rows in longer ones, that read a weight once."""
    completed = list(batches)
    lacking = [i for i, batch in enumerate(batches) if batch.reference is None]
    limit = REFERENCE_TOKENS if all(batch.segments is not None for batch in batches) else 0
    for together in fill_rows(lacking, lambda i: batches[i].input_ids.numel(), limit):
        row = join_rows([batches[i] for i in together]) if len(together) > 1 else batches[together[0]]
        states = reference_hidden(model, row).split([len(batches[i].nodes) for i in together])
        for i, own in zip(together, states, strict=True):
            completed[i] = replace(batches[i], reference=own)
    return completed


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a killed run may leave a half one.

    Args:
        folder: where checkpoints are.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:  # the state is the last file written
            complete.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return max(complete)[1] if complete else None


def discard_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Delete all checkpoints in `folder` but one."""
    for path in folder.glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path)


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
