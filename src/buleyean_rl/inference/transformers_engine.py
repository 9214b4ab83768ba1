"""The engine of transformers models in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import psutil

from buleyean_rl.data.chat_template import ChatTemplate, TemplateRefusal
from buleyean_rl.data.encode import Encoder, end_token_ids
from buleyean_rl.errors import EngineError
from buleyean_rl.inference.context import MEMORY_SHARE, affordable_tokens, choose_context, fit_prompt
from buleyean_rl.inference.decoding import BatchDecoder, Request
from buleyean_rl.inference.protocol import (
    GREEDY,
    Answer,
    BaseEngine,
    Messages,
    OnTokens,
    Outcome,
    RefusedPrompt,
    Sampling,
    Unanswered,
    find_stop,
)
from buleyean_rl.inference.sampling import TokenChooser, sample_token
from buleyean_rl.models.cached_decoder import CachedDecoder, UnsupportedModel
from buleyean_rl.models.private_interfaces import fits_static_cache

MAX_BATCH_TOKENS = 1 << 15  # rows times the longest prompt and answer


class TransformersEngine(BaseEngine):
    """A transformers model and its tokenizer.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer, with a chat template.
        batch: maximum number of conversations in a batch.
        context: maximum tokens of a conversation, prompt and answer; None, and at most, for the model's own, as memory
            allows.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 8, context: int | None = None) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.context = _choose_context(model, context)
        ids = model.generation_config.eos_token_id if model.generation_config else None
        self._special_ids = set(tokenizer.all_special_ids)
        self._eos_token_ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
        self._eos_token_ids |= end_token_ids(tokenizer)

    @property
    def is_batched(self) -> bool:
        """Not with the decoding kernel, whose rows do not depend on each other."""
        return self._batch_decoder is None

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer(
            text, add_special_tokens=add_special, split_special_tokens=not parse_special, verbose=False
        )["input_ids"]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template applied to messages."""
        self._require_template()
        with _as_engine_error():
            return ChatTemplate(self.tokenizer).render(messages, add_generation_prompt=add_generation_prompt)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of the rendered template, as in training: control tokens that a message spells are text."""
        self._require_template()
        with _as_engine_error():
            return self._encoder.encode_conversations([messages])[0].ids

    def generate(
        self, messages: Messages, sampling: Sampling = GREEDY, begun: Sequence[int] = ()
    ) -> Generator[str, None, Answer]:
        """The answer, streamed in pieces. See `Engine.generate`.

        Args:
            messages: the conversation.
            sampling: of what is drawn.
            begun: tokens that the answer begins with; they are not streamed, and count for nothing.
        """
        ids = fit_prompt(self, messages)
        if isinstance(ids, Unanswered):
            raise EngineError(ids.detail)
        text = self.tokenizer.decode(begun, skip_special_tokens=True)
        emitted = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        answer, drawn = list(begun), list(begun)
        logprobs = [0.0] * len(begun)
        limit = min(sampling.max_tokens, self.context - len(ids) - len(begun))
        if limit <= 0:
            return self._make_answer(drawn, logprobs, sampling)
        with closing(self._draw([*ids, *begun], limit, sampling)) as tokens:
            for token, logprob in tokens:
                drawn.append(token)
                logprobs.append(logprob)
                if token in self._eos_token_ids:
                    break
                answer.append(token)
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
        return self._make_answer(drawn, logprobs, sampling)

    def _draw(self, ids: list[int], limit: int, sampling: Sampling) -> Generator[tuple[int, float]]:
        """The tokens after a prompt, one by one, with their log-probabilities."""
        import torch

        if self._batch_decoder is not None:
            request = Request(ids, limit, sampling.temperature, sampling.top_p, sampling.seed)
            with closing(self._batch_decoder.run([request])) as drawn:
                yield from ((each.token, each.logprob) for each in drawn)
            return
        generator, cache, new_ids = torch.Generator().manual_seed(sampling.seed), None, ids
        for _ in range(limit):
            output = self._forward(new_ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            logits = output.logits[0, -1].float().cpu()
            new_ids = [sample_token(logits, sampling, generator)]
            yield new_ids[0], float(logits.log_softmax(-1)[new_ids[0]])

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """The answers as they come, or in batches of similar length where the decoding kernel is not used."""
        prompts: dict[int, list[int]] = {}
        for index, messages in enumerate(conversations):
            ids = fit_prompt(self, messages)
            if isinstance(ids, Unanswered):
                yield index, ids
            else:
                prompts[index] = ids
        drawn_seeds = {index: seeds[index] if seeds else sampling.seed + index for index in prompts}
        with closing(self._continue(prompts, sampling, drawn_seeds, on_tokens)) as continuations:
            for index, drawn, logprobs in continuations:
                yield index, self._make_answer(drawn, logprobs, sampling)

    def continue_ids(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The tokens that the model writes after others, with the end token where it ends.

        Args:
            prompts: token ids, one each at least, with room in the context.
            sampling: for all of them; the i-th has seed + i.
        """
        numbered = {index: list(ids) for index, ids in enumerate(prompts)}
        seeds = {index: sampling.seed + index for index in numbered}
        drawn = {index: tokens for index, tokens, _ in self._continue(numbered, sampling, seeds, None)}
        return [self._until_end(drawn[index]) for index in numbered]

    def _continue(
        self,
        prompts: Mapping[int, list[int]],
        sampling: Sampling,
        seeds: Mapping[int, int],
        on_tokens: OnTokens | None,
    ) -> Generator[tuple[int, list[int], list[float]]]:
        """Each prompt's index, and the tokens drawn after it with their log-probabilities: after an end, padding."""
        if self._batch_decoder is not None:
            yield from self._decode(self._batch_decoder, prompts, sampling, seeds, on_tokens)
            return
        for indices in self._batches(prompts, sampling.max_tokens):
            batch_seeds = [seeds[i] for i in indices]
            batch = self._continue_batch([prompts[i] for i in indices], sampling, batch_seeds, on_tokens)
            yield from ((index, *drawn) for index, drawn in zip(indices, batch, strict=True))

    def _decode(
        self,
        decoder: BatchDecoder,
        prompts: Mapping[int, list[int]],
        sampling: Sampling,
        seeds: Mapping[int, int],
        on_tokens: OnTokens | None,
    ) -> Generator[tuple[int, list[int], list[float]]]:
        """See `_continue`; each as it comes."""

        def is_stopped(drawn: Sequence[int]) -> bool:
            return find_stop(self.tokenizer.decode(drawn, skip_special_tokens=True), sampling.stop) is not None

        requests = [
            Request(
                *(ids, min(sampling.max_tokens, self.context - len(ids)), sampling.temperature, sampling.top_p),
                *(seeds[index], is_stopped if sampling.stop else None),
            )
            for index, ids in prompts.items()
        ]
        indices, tokens = list(prompts), [list[int]() for _ in prompts]
        logprobs = [list[float]() for _ in prompts]
        with closing(decoder.run(requests)) as steps:
            for drawn in steps:
                answer = tokens[drawn.request]
                answer.append(drawn.token)
                logprobs[drawn.request].append(drawn.logprob)
                if on_tokens is not None:
                    on_tokens(1)
                if drawn.is_last:
                    yield indices[drawn.request], answer, logprobs[drawn.request]

    @cached_property
    def _batch_decoder(self) -> BatchDecoder | None:
        """Of the decoding kernel; None where it does not compute this model."""
        try:
            decoder = CachedDecoder(self.model)
        except UnsupportedModel:
            return None
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        return BatchDecoder(
            decoder,
            end_tokens=self._eos_token_ids,
            context=self.context,
            cache_bytes=min(weights, int(MEMORY_SHARE * psutil.virtual_memory().available)),
            parallel=self.batch,
        )

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

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise EngineError("this tokenizer has no chat template; use an instruct model")

    def _forward(self, ids: Sequence[int], **settings: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)], device=self.model.device), **settings)

    def _batches(self, prompts: Mapping[int, Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts in batches of similar length, within `batch` and MAX_BATCH_TOKENS.

        In a batch all have room for the same number of tokens: `max_tokens`, or what is left of the context.
        """
        batch: list[int] = []
        free_tokens = {index: min(max_tokens, self.context - len(ids)) for index, ids in prompts.items()}
        for index in sorted(prompts, key=lambda index: len(prompts[index])):
            rows = len(batch) + 1
            if batch and (
                rows > self.batch
                or rows * (len(prompts[index]) + max_tokens) > MAX_BATCH_TOKENS
                or free_tokens[index] != free_tokens[batch[0]]
            ):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _continue_batch(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], on_tokens: OnTokens | None
    ) -> list[tuple[list[int], list[float]]]:
        """See `_continue`; prompts padded on the left to one length."""
        import torch

        width = max(map(len, prompts))
        new_tokens = min(sampling.max_tokens, self.context - width)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self._eos_token_ids)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        chooser = TokenChooser(sampling, seeds, self._eos_token_ids, on_tokens)
        with torch.inference_mode(), _contiguous_input(self.model.get_output_embeddings()):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                cache=self._static_cache(width + new_tokens),
                disable_compile=True,
                max_new_tokens=new_tokens,
                logits_processor=[chooser],
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=sorted(self._eos_token_ids) or None,
            )
        return list(zip(output[:, width:].tolist(), chooser.logprobs, strict=True))

    def _static_cache(self, tokens: int) -> Any:
        """A preallocated KV cache where the model supports it: a growing one is copied at every step."""
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=tokens) if fits_static_cache(self.model) else None

    def _until_end(self, drawn: list[int]) -> list[int]:
        """What was drawn, up to the first end token and with it."""
        end = next((k for k, token in enumerate(drawn) if token in self._eos_token_ids), len(drawn))
        return drawn[: end + 1]

    def _make_answer(self, drawn: list[int], logprobs: list[float], sampling: Sampling) -> Answer:
        """The answer of what was drawn: tokens after its end token are padding."""
        text = self.tokenizer.decode(drawn, skip_special_tokens=True)
        ids = self._until_end(drawn)
        ended = bool(ids) and ids[-1] in self._eos_token_ids
        ids = ids[:-1] if ended else ids
        cut = find_stop(text, sampling.stop)
        is_exact = cut is None and self._special_ids.isdisjoint(ids)  # the text lacks special tokens
        return Answer(
            text[:cut],
            len(ids),
            ended or cut is not None,
            tuple(ids) if is_exact else None,
            tuple(logprobs[: len(ids)]) if sampling.logprobs else None,
        )


def _choose_context(model: Any, requested: int | None) -> int:
    """See `choose_context`: keys and values of all layers, and the largest activations of one."""
    import torch

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * config.num_hidden_layers * kv_heads * head_size
    activations = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    device = torch.device(model.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = affordable_tokens((cached + activations) * model.dtype.itemsize, free)
    return choose_context(requested, getattr(config, "max_position_embeddings", None) or affordable, affordable)


@contextmanager
def _as_engine_error() -> Iterator[None]:
    """A chat template's refusal as an engine's."""
    try:
        yield
    except TemplateRefusal as refusal:
        raise RefusedPrompt(str(refusal)) from refusal


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
