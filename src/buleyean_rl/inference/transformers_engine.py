"""The engine of transformers models in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.protocol import GREEDY, Answer, BaseEngine, Messages, Sampling, find_stop
from buleyean_rl.models.private_interfaces import fits_static_cache
from buleyean_rl.models.template_end import template_end_token

NUCLEUS_CANDIDATES = 1024  # likeliest tokens that nearly always contain the nucleus
MAX_BATCH_TOKENS = 1 << 15  # rows times the longest prompt and answer


class TransformersEngine(BaseEngine):
    """A transformers model and its tokenizer.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer, with a chat template.
        batch: maximum number of conversations in a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 8) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        ids = model.generation_config.eos_token_id if model.generation_config else None
        ends = (tokenizer.eos_token_id, template_end_token(tokenizer), *(ids if isinstance(ids, list) else [ids]))
        self._eos_token_ids = set(ends) - {None}

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer(
            text, add_special_tokens=add_special, split_special_tokens=not parse_special, verbose=False
        )["input_ids"]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template applied to messages."""
        if not self.tokenizer.chat_template:
            raise EngineError("this tokenizer has no chat template; use an instruct model")
        return self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of the rendered template, which contains the BOS where the model has one."""
        return self.tokenize(self.render(messages))

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer, streamed in pieces."""
        import torch

        ids, emitted, text, cache = self.prompt_ids(messages), 0, "", None
        answer: list[int] = []
        generator = torch.Generator().manual_seed(sampling.seed)
        new_ids = ids
        while len(answer) < sampling.max_tokens:
            output = self._forward(new_ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            token = _sample_token(output.logits[0, -1].float().cpu(), sampling, generator)
            if token in self._eos_token_ids:
                break
            answer.append(token)
            new_ids = [token]
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            cut = find_stop(text, sampling.stop)
            if cut is not None:
                text = text[:cut]
                break
            # With the next token the tail may become another character, or a stop text.
            pending = max((len(s) - 1 for s in sampling.stop), default=0)
            ready = len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - pending
            if ready > emitted:
                yield text[emitted:ready]
                emitted = ready
        if text[emitted:]:
            yield text[emitted:]

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers in order, in batches of similar length."""
        answers = [Answer("", 0, False)] * len(conversations)
        done = 0
        prompts = [self.prompt_ids(messages) for messages in conversations]
        for indices in self._batches(list(map(len, prompts)), sampling.max_tokens):
            batch = self._answer_batch([prompts[i] for i in indices], sampling, [sampling.seed + i for i in indices])
            for i, answer in zip(indices, batch, strict=True):
                answers[i] = answer
            done += len(indices)
            if on_done is not None:
                on_done(done)
        return answers

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens, in fp32 from the model's logits."""
        logits = self._forward(ids, logits_to_keep=1).logits[0, -1]
        top = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """The tokens' log-probabilities, one forward pass per sequence."""
        import torch

        scores = []
        for ids, start in zip(sequences, starts or [1] * len(sequences), strict=True):
            logps = self._forward(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
            tokens = torch.tensor(ids[start:], dtype=torch.long, device=logps.device)
            scores.append(logps.gather(-1, tokens[:, None])[:, 0].tolist())
            if on_done is not None:
                on_done(len(scores))
        return scores

    def close(self) -> None:
        """Nothing to do: the model belongs to the caller."""

    def _forward(self, ids: Sequence[int], **settings: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)], device=self.model.device), **settings)

    def _batches(self, lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts in batches of similar length, within `batch` and MAX_BATCH_TOKENS."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            rows = len(batch) + 1
            if batch and (rows > self.batch or rows * (lengths[index] + max_tokens) > MAX_BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _answer_batch(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Answer]:
        """Answers to prompts padded on the left to one length."""
        import torch

        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self._eos_token_ids)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.inference_mode(), _contiguous_input(self.model.get_output_embeddings()):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                cache=self._static_cache(width + sampling.max_tokens),
                disable_compile=True,
                max_new_tokens=sampling.max_tokens,
                logits_processor=[_SeededSampler(sampling, seeds)] if sampling.temperature > 0 else None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=sorted(self._eos_token_ids) or None,
            )
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [
            self._make_answer(text, drawn, sampling)
            for text, drawn in zip(texts, output[:, width:].tolist(), strict=True)
        ]

    def _static_cache(self, tokens: int) -> Any:
        """A preallocated KV cache where the model supports it: a growing one is copied at every step."""
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=tokens) if fits_static_cache(self.model) else None

    def _make_answer(self, text: str, drawn: list[int], sampling: Sampling) -> Answer:
        """The answer of a batch row: tokens after its end token are padding."""
        end = next((k for k, token in enumerate(drawn) if token in self._eos_token_ids), None)
        cut = find_stop(text, sampling.stop)
        return Answer(text[:cut], len(drawn) if end is None else end, end is not None or cut is not None)


@contextmanager
def _contiguous_input(head: Any) -> Iterator[None]:
    """Make an output head's input contiguous.

    After the prompt transformers passes a slice of the hidden states, the last of each row, which torch would multiply
    with a copy of the weight per row.
    """
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


class _SeededSampler:
    """A logits processor that samples each row's token by a generator of its own, so that no other can be chosen.

    In transformers' sampling the rows share a generator, so an answer would depend on the other rows.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        import torch

        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 - the signature is transformers'
        import torch

        rows = zip(scores.float().cpu(), self.generators, strict=True)
        drawn = torch.tensor(
            [_sample_token(row, self.sampling, generator) for row, generator in rows], device=scores.device
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def _sample_token(logits: Any, sampling: Sampling, generator: Any) -> int:
    """Sample a token from logits. Shape: (vocabulary,)."""
    import torch

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
