"""What each part of an objective is worth: own loops, with one thing changed at a time.

    python studies/ablations.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER [--objective ratio]

The task is that of `own_loops.py`. Beside settings that the package has, choices are changed that it leaves nobody:
what the target is a multiple of, what the contrast is, and how far a rejection reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Batch
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.models.views import backbone
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.losses import NodeLosses, Objective, kl_to_target
from buleyean_rl.training.trainer import BuleyeanTrainer
from harness import Method
from own_loops import Task, parser, prepare, table

RATE = 5e-4  # the demo's


class Parts(NamedTuple):
    """What a loss is made of.

    Args:
        uniform: the target is on a uniform base, as published, not on the base model.
        contrast: `unlikelihood`, the package's; `gated`, the same times 1 - pi_base: less of it where the base is sure;
            `published`, the cross-entropy towards what was rejected; `none`.
    """

    uniform: bool = False
    contrast: str = "unlikelihood"


class Ablation(NamedTuple):
    """A run with one thing changed.

    Args:
        label: what.
        settings: of `BuleyeanConfig`.
        parts: of the loss, if they are not the package's.
        records: another view of the rejections.
        epochs: over them.
    """

    label: str
    settings: tuple[tuple[str, Any], ...] = ()
    parts: Parts | None = None
    records: Callable[[list[RejectionRecord]], list[RejectionRecord]] = list
    epochs: float = 2


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
        tuple((a, min(b, end)) for a, b in of if a < end) for of, end in zip(record.rejected_spans, ends, strict=True)
    )
    answers = (answer[:end] for answer, end in zip(record.rejected_responses, ends, strict=True))
    return replace(record, rejected_responses=tuple(answers), rejected_spans=tuple(spans))


def first_words(record: RejectionRecord) -> RejectionRecord:
    """Of each stretch that repeats only the first word is rejected: there the answer could still turn elsewhere."""
    spans = tuple(
        tuple((start, start + len(answer[start:end].split()[0])) for start, end in of)
        for answer, of in zip(record.rejected_responses, record.rejected_spans, strict=True)
    )
    return replace(record, rejected_spans=spans)


def after_others(records: list[RejectionRecord]) -> list[RejectionRecord]:
    """Every answer after its own prompt, and after that of the next record: what repeats is wrong there too."""
    swapped = [replace(a, prompt=b.prompt) for a, b in zip(records, records[1:] + records[:1], strict=True)]
    return [*records, *swapped]


def in_rounds(rounds: int, record: RejectionRecord) -> RejectionRecord:
    """Rejected in every round of so many."""
    counts = tuple(rounds if count else 0 for count in record.rejection_counts)
    return replace(record, rejection_counts=counts, total_rounds=rounds)


def at_alpha(ablation: Ablation) -> Ablation:
    """The same with less of the contrast."""
    label = "-".join(filter(None, ("alpha0.9", ablation.label)))
    return ablation._replace(label=label, settings=(("alpha", 0.9), *ablation.settings))


SHARED = [
    Ablation("whole", records=each(whole)),
    Ablation("T1", records=each(partial(in_rounds, 1))),
    Ablation("T8", records=each(partial(in_rounds, 8))),
    Ablation("T500", records=each(partial(in_rounds, 500))),
    Ablation("rank4", (("lora_rank", 4), ("lora_alpha", 8))),
    Ablation("after-others", records=after_others, epochs=1),
    Ablation("batch8", (("per_device_train_batch_size", 8),), epochs=4),
]
OF_COMPLEMENT = [
    Ablation(""),
    Ablation("gated", parts=Parts(contrast="gated")),
    Ablation("first-words", records=each(first_words)),
    Ablation("beginning", records=each(partial(beginning, 100))),
    Ablation("start", records=each(partial(beginning, 6)), epochs=4),
    Ablation("alpha0.4", (("alpha", 0.4),)),
    Ablation("no-contrast", parts=Parts(contrast="none")),
    Ablation("uniform", parts=Parts(uniform=True)),
    Ablation("published-contrast", parts=Parts(contrast="published")),
    Ablation("no-contrast-tau8", (("tau", 8.0),), parts=Parts(contrast="none")),
    Ablation("tau3", (("tau", 3.0),)),
    *SHARED,
    at_alpha(Ablation("")),
]
OF_RATIO = [*map(at_alpha, (Ablation(""), *SHARED)), Ablation("")]
ABLATIONS = {"complement": OF_COMPLEMENT, "ratio": OF_RATIO}


def ablated_loss(logits: Tensor, base: Tensor, counts: Counts, objective: Objective, parts: Parts) -> NodeLosses:
    """`losses.complement_loss` of other parts, without a floor.

    Args:
        logits: the model's. Shape: (nodes, vocabulary).
        base: the base model's. Shape: (nodes, vocabulary).
        counts: rejections at each node.
        objective: alpha and tau.
        parts: which.
    """
    log_pi, reference = logits.log_softmax(-1), base.detach().softmax(-1)
    kl = kl_to_target(log_pi, None if parts.uniform else reference, counts, objective.tau)
    at = counts.node, counts.option
    log_not_pi = (-torch.expm1(log_pi[at])).clamp_min(torch.finfo(log_pi.dtype).eps).log()
    against = {
        "unlikelihood": -log_not_pi,
        "gated": -(1 - reference[at]) * log_not_pi,
        "published": -log_pi[at],
        "none": torch.zeros_like(log_not_pi),
    }[parts.contrast]
    contrast = counts.sum_by_node(counts.rate * against)
    loss = objective.alpha * kl + (1 - objective.alpha) * contrast
    return NodeLosses(loss, kl.detach(), contrast.detach(), torch.zeros_like(kl).detach())


class AblatedTrainer(BuleyeanTrainer):
    """The package's trainer with a loss of other parts.

    Args:
        parts: which.
        others: as for `BuleyeanTrainer`.
    """

    def __init__(self, parts: Parts, *others: Any, **named: Any) -> None:
        self.parts = parts
        super().__init__(*others, **named)

    def losses(self, batch: Batch) -> NodeLosses:
        """The loss at each node, dense."""
        hidden = forward_hidden(backbone(self._peft_model), batch)
        logits, base = self.head(hidden), self.head(batch.reference)
        return ablated_loss(logits, base, batch.counts.astype(torch.float32), self.args.loss, self.parts)


def main() -> None:
    """Run what is not done yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--objective", choices=ABLATIONS, default="complement", help="what is changed")
    arguments = options.parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for ablation in ABLATIONS[arguments.objective]:
            run(task, arguments.objective, ablation)
    print(table(arguments.output))


def run(task: Task, objective: str, ablation: Ablation) -> None:
    """Train and measure, if it was not done before."""
    method = Method(objective, RATE, ablation.epochs, label=ablation.label, settings=ablation.settings)
    trainer_of = partial(AblatedTrainer, ablation.parts) if ablation.parts else None
    task.run(method, task.boundaries(ablation.records(task.records)), trainer_of=trainer_of)


if __name__ == "__main__":
    main()
