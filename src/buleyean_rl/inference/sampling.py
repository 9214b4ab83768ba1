"""Draw tokens from logits in torch, for transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buleyean_rl.inference.protocol import OnTokens, Sampling

NUCLEUS_CANDIDATES = 1024  # likeliest tokens that nearly always contain the nucleus


class TokenChooser:
    """A logits processor that chooses each row's token, so that no other can be drawn.

    In transformers' sampling the rows share a generator, so an answer would depend on the other rows.

    Args:
        sampling: of all rows.
        seeds: of each row.
        end_tokens: after which a row has only padding.
        on_tokens: called with the number of tokens in a step.
    """

    logprobs: list[list[float]]  # of each row's tokens, if `sampling` asks for them

    def __init__(
        self, sampling: Sampling, seeds: Sequence[int], end_tokens: set[int], on_tokens: OnTokens | None
    ) -> None:
        self.logprobs = [[] for _ in seeds]
        self._sampling, self._end_tokens, self._on_tokens = sampling, end_tokens, on_tokens
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._running = [True] * len(seeds)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the signature is transformers'
        """Scores of which all but the chosen tokens' are minus infinity. Shapes: (rows, tokens), (rows, vocabulary)."""
        if self._sampling.temperature > 0:
            rows = zip(scores.float().cpu(), self._generators, strict=True)
            drawn = [sample_token(row, self._sampling, generator) for row, generator in rows]
        else:
            drawn = scores.argmax(-1).tolist()
        chosen = torch.tensor(drawn, device=scores.device)[:, None]
        if self._sampling.logprobs:
            for row, logprob in zip(self.logprobs, scores.float().log_softmax(-1).gather(-1, chosen), strict=True):
                row.append(float(logprob))
        if self._on_tokens is not None:
            self._on_tokens(sum(self._running))
        pairs = zip(self._running, drawn, strict=True)
        self._running = [runs and token not in self._end_tokens for runs, token in pairs]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample a token from logits.

    Args:
        logits: of the next token. Shape: (vocabulary,).
        sampling: how.
        generator: of random numbers.
    """
    if sampling.temperature <= 0:
        return int(logits.argmax())
    if sampling.top_p >= 1:
        weights = ((logits - logits.max()) / sampling.temperature).exp()
        return int(torch.multinomial(weights, 1, generator=generator))
    # Sorting the whole vocabulary would take longer than a forward pass.
    for k in (min(NUCLEUS_CANDIDATES, len(logits)), len(logits)):
        top_logits, tokens = logits.topk(k)
        probabilities = (top_logits - logits.logsumexp(-1)).exp()
        preceding = probabilities.cumsum(-1) - probabilities
        if preceding[-1] + probabilities[-1] >= sampling.top_p:
            break
    in_nucleus = preceding < sampling.top_p  # including the token that crosses top_p
    weights = torch.where(in_nucleus, probabilities, 0.0) ** (1.0 / sampling.temperature)
    return int(tokens[torch.multinomial(weights, 1, generator=generator)])
