"""The package's trainer with the loss of a baseline.

answers of a step --likelihoods, or logits--> the baseline's loss --+
where nothing was rejected, and anchors --KL(base || pi)------------+--> step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baselines import NEEDS_CHOSEN, Baseline, Scores, ascent, dpo, ftpo, kto, npo, sft, simnpo, unlikelihood
from buleyean_rl.batching.batch import Batch, collect_answers
from buleyean_rl.batching.forward import forward_hidden, reference_hidden
from buleyean_rl.batching.layout import LAYOUTS
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.views import backbone
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import fused_loss, token_logprobs
from buleyean_rl.objectives.losses import NodeLosses, Objective
from buleyean_rl.training.trainer import BuleyeanTrainer

KL = Objective("complement", alpha=1.0, min_p=0.0)  # without counts: KL(base || pi)


class BaselineTrainer(BuleyeanTrainer):
    """The package's trainer with another loss.

    The loss of a step is a mean over its records, plus `Baseline.anchor` times the mean KL(base || pi) over the nodes
    of their answers at which nothing was rejected, and as much over the anchors' nodes.

    Args:
        baseline: which.
        arguments: as for `BuleyeanTrainer`; for `dpo` and `sft`, answers at count 0 are the chosen ones.
    """

    def __init__(self, baseline: Baseline, *arguments: Any, **options: Any) -> None:
        self.baseline = baseline
        self._divergence: Tensor | None = None
        super().__init__(*arguments, **options)

    def collate(self, numbered: Sequence[tuple[int, Boundary]]) -> dict[str, Any]:
        """Rows with the answers in them; for `kto` also the answers under each other's prompts."""
        inputs: dict[str, Any] = super().collate(numbered)
        boundaries = dict(numbered)
        inputs["batches"] = [
            self._weigh(batch, [boundaries[number] for number in batch.numbers]) for batch in inputs["batches"]
        ]
        if self.baseline.name == "kto" and not is_anchor(numbered[0][1]):
            own = [boundary for _, boundary in numbered]
            swapped = [replace(a, prompt=b.prompt) for a, b in zip(own, own[1:] + own[:1], strict=True)]
            inputs["mismatched"] = replace(LAYOUTS[self.layout](swapped), answers=collect_answers(swapped))
        return inputs

    def _weigh(self, batch: Batch, boundaries: Sequence[Boundary]) -> Batch:
        """With the answers, and a weight for each term of the loss: those of records, or of anchors."""
        if is_anchor(boundaries[0]):
            weights = [
                1 / (boundary.nodes * self.args.anchors) for boundary in boundaries for _ in range(boundary.nodes)
            ]
            return replace(batch, weights=torch.tensor(weights), normaliser=0.0)
        return replace(batch, answers=collect_answers(boundaries), weights=None, normaliser=float(len(boundaries)))

    @property
    def uses_reference(self) -> bool:
        """See `BuleyeanTrainer.uses_reference`."""
        return self.baseline.uses_base

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """As the package's, after z where there is one."""
        if "mismatched" in inputs:
            batch = inputs["mismatched"].to(self.args.device)
            with torch.no_grad():
                model.eval()
                hidden, base = forward_hidden(backbone(model), batch), reference_hidden(model, batch)
                model.train()
                scores = self._scores(hidden, base, batch, lambda answers: torch.ones_like(answers.rejected))
            self._divergence = (scores.policy - scores.base).mean().clamp_min(0)
        return super().training_step(model, inputs, num_items_in_batch)

    def losses(self, batch: Batch) -> NodeLosses:
        """The terms of a batch: the baseline's of each record, then the KL's. No parts, no floor."""
        hidden = forward_hidden(self.language_model.backbone, batch)
        if batch.answers is None:
            terms = self.baseline.anchor * self._divergences(hidden, batch)
        else:
            terms = self._rejections(hidden, batch)
            if self.baseline.anchor:
                terms = torch.cat(
                    [terms, self.baseline.anchor * self._record_divergences(hidden, batch, at_rejected=False)]
                )
        return NodeLosses(terms, *(torch.zeros_like(terms) for _ in range(3)))

    def _rejections(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The baseline's loss of each answer, or pair. Shape: (answers,)."""
        name, beta = self.baseline.name, self.baseline.beta
        if name == "ftpo":
            return self._first_tokens(hidden, batch)
        base = hidden.detach() if batch.reference is None else batch.reference
        rejected = self._scores(hidden, base, batch, lambda answers: answers.rejected)
        if name in NEEDS_CHOSEN:
            counts = batch.answers.counts  # type: ignore[union-attr]
            chosen = self._scores(hidden, base, batch, lambda answers: torch.ones_like(answers.rejected))
            liked, disliked = counts.count == 0, counts.count > 0
            pairs = _select(chosen, liked), _select(rejected, disliked)
            return sft(chosen)[liked] if name == "sft" else dpo(*pairs, beta)
        losses: dict[str, Callable[[], Tensor]] = {
            "ascent": lambda: ascent(rejected),
            "unlikelihood": lambda: unlikelihood(rejected),
            "npo": lambda: npo(rejected, beta),
            "simnpo": lambda: simnpo(rejected, beta, self.baseline.margin),
            "kto": lambda: kto(rejected, self._divergence, beta),  # type: ignore[arg-type]
            "pmpo": lambda: torch.cat([ascent(rejected), beta * self._record_divergences(hidden, batch)]),
        }
        return losses[name]()

    def _first_tokens(self, hidden: Tensor, batch: Batch) -> Tensor:
        """`ftpo` of each answer that has a rejected token."""
        answers = batch.answers
        assert answers is not None
        assert batch.reference is not None
        owners = answers.answer_index[answers.rejected]
        first = torch.searchsorted(owners, owners.unique())  # entries stand answer after answer
        tokens = answers.token_index[answers.rejected][first]
        nodes = answers.parent[tokens]
        logits, base = (self._logits(states[nodes]) for states in (hidden, batch.reference))
        return ftpo(logits, base.detach(), answers.token[tokens])

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.head.weight
        raw = hidden.to(weight.dtype) @ weight.T
        return self.head.scale_and_cap(raw if self.head.bias is None else raw + self.head.bias)

    def _divergences(self, hidden: Tensor, batch: Batch) -> Tensor:
        """KL(base || pi) at each node. Shape: (nodes,)."""
        none = torch.zeros(0, dtype=torch.long, device=hidden.device)
        counts = Counts(none, none, none.double(), none.double(), len(batch.nodes))
        return fused_loss(hidden, self.head, counts, KL, batch.reference).loss

    def _record_divergences(self, hidden: Tensor, batch: Batch, *, at_rejected: bool = True) -> Tensor:
        """Mean KL(base || pi) over each record's nodes, or over those without a rejection. Shape: (records,)."""
        taken = torch.ones_like(batch.nodes, dtype=hidden.dtype)
        if not at_rejected:
            taken[batch.counts.node[batch.counts.count > 0]] = 0
        divergences = self._divergences(hidden, batch).to(hidden.dtype)
        zeros = taken.new_zeros(int(batch.record.max()) + 1)
        sums = zeros.index_add(0, batch.record, divergences * taken)
        return sums / zeros.index_add(0, batch.record, taken).clamp_min(1)

    def _scores(self, hidden: Tensor, base: Tensor, batch: Batch, token_mask: Callable[[Any], Tensor]) -> Scores:
        answers = batch.answers
        assert answers is not None
        mask = token_mask(answers)
        policy = token_logprobs(hidden[answers.parent], self.head, answers.token)[answers.token_index[mask]]
        frozen = token_logprobs(base[answers.parent], self.head, answers.token)[answers.token_index[mask]]
        answer, zeros = answers.answer_index[mask], policy.new_zeros(len(answers.counts.node))
        return Scores(policy, answer, zeros.index_add(0, answer, policy), zeros.index_add(0, answer, frozen))


def is_anchor(boundary: Boundary) -> bool:
    """Whether nothing of it was rejected."""
    return not boundary.rejected_answers


def _select(scores: Scores, which: Tensor) -> Scores:
    """The sums of some answers; `tokens` and `answer` stay those of all."""
    return scores._replace(policy=scores.policy[which], base=scores.base[which])
