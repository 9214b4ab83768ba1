"""Tiny tokenizers of other kinds than `tiny_tokenizer`: BPE on characters and Unigram, as sentencepiece makes them."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny import SENTENCES

# A template in the manner of Zephyr: role marks that are text, EOS after every turn.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# In the manner of Gemma: no system message, turns alternate, contents are trimmed.
STRICT = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
SPECIALS = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def character_bpe(scheme: str = "normalizer", template: str = ZEPHYR) -> PreTrainedTokenizerFast:
    """BPE on characters with byte fallback, that puts "▁" before a text.

    Args:
        scheme: "normalizer" puts it before every piece between control tokens, as Llama 2; "first" only before the
            text, as Mistral; "never" nowhere, as Gemma.
        template: the chat template.
    """
    alphabet = sorted({character for sentence in SENTENCES for character in sentence if character != " "} | {"▁"})
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIALS, *BYTES], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([f" {sentence}" for sentence in SENTENCES for _ in range(3)], trainer)
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIALS]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "first":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    stripping = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripping]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _wrap(tokenizer, template)


def unigram(template: str = ZEPHYR) -> PreTrainedTokenizerFast:
    """Unigram with control tokens among its pieces, as T5 and XGLM."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=[*SPECIALS],
        unk_token="<unk>",
        initial_alphabet=list("<>|/suern_"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "</s> <s> <unk> <|user|>"], trainer)
    return _wrap(tokenizer, template)


def _wrap(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    if template is STRICT:
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<start>", "<end>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
