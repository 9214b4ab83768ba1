"""What each part of the objective is worth: own loops, with one thing changed at a time.

    python studies/ablations.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER

The task is that of `own_loops.py`. Beside settings of the package, choices are changed that it does not offer: what the
target is a multiple of, what the contrast is, and how far a rejection reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harness
from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import NodeLosses, Objective, complement_loss, kl_to_target
from buleyean_rl.training.trainer import BuleyeanTrainer
from harness import SETTINGS, Method
from own_loops import Task, parser, prepare, table

RATE = 5e-4  # the demo's

DenseLoss = Callable[[Tensor, Tensor, Counts, Objective], NodeLosses]


def uniform_base_loss(logits: Tensor, base: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """`losses.complement_loss` with the target on a uniform base, as published.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        base: the base model's. Shape: (nodes, vocabulary).
        counts: rejections at each node.
        objective: alpha and tau.
    """
    return complement_loss(logits, torch.zeros_like(base), counts, objective)


def published_contrast_loss(logits: Tensor, base: Tensor, counts: Counts, objective: Objective) -> NodeLosses:
    """`losses.complement_loss` with the published contrast, a cross-entropy towards what was rejected; no floor.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        base: the base model's. Shape: (nodes, vocabulary).
        counts: rejections at each node.
        objective: alpha and tau.
    """
    log_pi = logits.log_softmax(-1)
    kl = kl_to_target(log_pi, base.detach().softmax(-1), counts, objective)
    contrast = -counts.sum_by_node(counts.rate * log_pi[counts.node, counts.option])
    loss = objective.alpha * kl + (1 - objective.alpha) * contrast
    return NodeLosses(loss, kl.detach(), contrast.detach(), torch.zeros_like(kl).detach())


class Ablation(NamedTuple):
    """A run with one thing changed.

    Args:
        label: what, if neither alpha nor nothing.
        settings: of `BuleyeanConfig`.
        loss: another one than the package's.
        records: another view of the rejections.
        epochs: over them.
    """

    label: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    loss: DenseLoss | None = None
    records: Callable[[list[RejectionRecord]], list[RejectionRecord]] = list
    epochs: float = 2

    @property
    def method(self) -> Method:
        """How it trains."""
        alpha = dict(self.settings).get("alpha", SETTINGS["alpha"])
        label = "-".join(filter(None, (f"alpha{alpha:g}", self.label)))
        return Method("complement", RATE, self.epochs, label=label, settings=self.settings)


def each(
    change: Callable[[RejectionRecord], RejectionRecord],
) -> Callable[[list[RejectionRecord]], list[RejectionRecord]]:
    """A change to every record."""
    return lambda records: [change(record) for record in records]


def whole(record: RejectionRecord) -> RejectionRecord:
    """All of an answer is rejected, not the span."""
    return replace(record, rejected_spans=((),) * len(record.rejected_responses))


def beginning(reach: int, record: RejectionRecord) -> RejectionRecord:
    """Answers end so many characters after the first place that was rejected."""
    ends = [spans[0][0] + reach for spans in record.rejected_spans]
    spans = (
        tuple((a, min(b, end)) for a, b in rejected if a < end)
        for rejected, end in zip(record.rejected_spans, ends, strict=True)
    )
    answers = (answer[:end] for answer, end in zip(record.rejected_responses, ends, strict=True))
    return replace(record, rejected_responses=tuple(answers), rejected_spans=tuple(spans))


def first_words(record: RejectionRecord) -> RejectionRecord:
    """Only the first word of each repeat is rejected: there the answer could still turn elsewhere."""
    spans = tuple(
        tuple((start, start + len(answer[start:end].split()[0])) for start, end in rejected)
        for answer, rejected in zip(record.rejected_responses, record.rejected_spans, strict=True)
    )
    return replace(record, rejected_spans=spans)


def after_others(records: list[RejectionRecord]) -> list[RejectionRecord]:
    """Every answer after its own prompt, and after that of the next record: what repeats is wrong there too."""
    swapped = [replace(a, prompt=b.prompt) for a, b in zip(records, records[1:] + records[:1], strict=True)]
    return [*records, *swapped]


def in_rounds(rounds: int, record: RejectionRecord) -> RejectionRecord:
    """Rejected in every round of so many."""
    counts = tuple(rounds if count else 0 for count in record.rejection_counts)
    return replace(record, rejection_counts=counts, rounds=(rounds,) * len(counts))


ABLATIONS = [
    Ablation(),
    Ablation("whole", records=each(whole)),
    Ablation("T1", records=each(partial(in_rounds, 1))),
    Ablation("T8", records=each(partial(in_rounds, 8))),
    Ablation("T500", records=each(partial(in_rounds, 500))),
    Ablation("rank4", (("lora_rank", 4), ("lora_alpha", 8))),
    Ablation("after-others", records=after_others, epochs=1),
    Ablation("batch8", (("per_device_train_batch_size", 8),), epochs=4),
    Ablation(settings=(("alpha", 1.0),)),
    Ablation(settings=(("alpha", 0.7),)),
    Ablation(settings=(("alpha", 0.4),)),
    Ablation("published-contrast", loss=published_contrast_loss),
    Ablation("uniform", loss=uniform_base_loss),
    Ablation("tau3", (("tau", 3.0),)),
    Ablation("first-words", records=each(first_words)),
    Ablation("beginning", records=each(partial(beginning, 100))),
    Ablation("start", records=each(partial(beginning, 6)), epochs=4),
]
REFERENCE = ABLATIONS[0].method.run  # what the others are compared with, prompt by prompt


class AblatedTrainer(BuleyeanTrainer):
    """The package's trainer with another loss.

    Args:
        loss: which.
        arguments: as for `BuleyeanTrainer`.
    """

    def __init__(self, loss: DenseLoss, *arguments: Any, **options: Any) -> None:
        self.dense_loss = loss
        super().__init__(*arguments, **options)

    def losses(self, batch: Batch) -> NodeLosses:
        """The loss at each node, dense."""
        hidden = forward_hidden(self.language_model.backbone, batch)
        logits, base = self.head(hidden), self.head(batch.reference)
        return self.dense_loss(logits, base, batch.counts.astype(torch.float32), self.args.loss)


def run(task: Task, ablation: Ablation) -> None:
    """Train and measure, if it was not done before."""
    trainer_type = partial(AblatedTrainer, ablation.loss) if ablation.loss else None
    task.run(ablation.method, task.boundaries(ablation.records(task.records)), trainer_type=trainer_type)


def main() -> None:
    """Run what is not done yet, and print the table."""
    arguments = parser(__doc__).parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for ablation in ABLATIONS:
            run(task, ablation)
        for name in task.summary.runs:
            harness.compare_loops(task.summary, name, REFERENCE)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
