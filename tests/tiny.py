"""Tiny random models and a tokenizer, made in process: what the tests train, export and chat with.

Plain functions rather than fixtures, so that any test module can call them with its own settings. Every
one of them is a pure function of its arguments: same call, same weights, same token ids.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "How do you handle conflict? Ignore it, or talk it through with a friend.",
    "What is the capital of France? The capital of France is Paris.",
    "Give me two tips for sleeping better: keep a schedule, and leave the phone outside.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 42 1000 2024.",
    "Déjà vu, naïve café, Straße, emoji 🙂 and 漢字 too.",
    "I'm here to help. What's on your mind? You are a helpful assistant.",
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPLITS = {
    # The two splits llama.cpp knows as `smollm` and `qwen2`; both tokenizers are byte-level BPE.
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                pattern=Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
                invert=False,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def tiny_tokenizer(split: str = "smollm", *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about `vocab_size` tokens with ChatML specials: eos is <|im_end|>, no bos is added.

    `split` names the pre-tokenizer: "smollm", "gpt-2" or "qwen2".
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, *, tie: bool = True, seed: int = 0, **config: object
) -> LlamaForCausalLM:
    """A random two-layer Llama, fp32, grouped-query attention, whose vocabulary fits `tokenizer`."""
    return _build(LlamaForCausalLM, LlamaConfig, tokenizer, tie, seed, config)


def tiny_mistral(
    tokenizer: PreTrainedTokenizerFast, *, tie: bool = False, seed: int = 0, **config: object
) -> MistralForCausalLM:
    """A random two-layer Mistral; pass `sliding_window=` for one that forgets."""
    return _build(MistralForCausalLM, MistralConfig, tokenizer, tie, seed, config)


def tiny_qwen2(
    tokenizer: PreTrainedTokenizerFast, *, tie: bool = True, seed: int = 0, **config: object
) -> Qwen2ForCausalLM:
    """A random two-layer Qwen2, whose q, k and v have biases."""
    return _build(Qwen2ForCausalLM, Qwen2Config, tokenizer, tie, seed, config)


def tiny_model(
    architecture: str, tokenizer: PreTrainedTokenizerFast, *, tie: bool = True, seed: int = 0, **config: object
) -> PreTrainedModel:
    """A random two-layer model of any other causal class of transformers, such as "GPT2LMHeadModel"."""
    model_class = getattr(transformers, architecture)
    return _build(model_class, model_class.config_class, tokenizer, tie, seed, config)


def _build(
    model_class: type,
    config_class: type,
    tokenizer: PreTrainedTokenizerFast,
    tie: bool,
    seed: int,
    config: dict,
) -> PreTrainedModel:
    """A model with weights large enough that its next-token distributions are far from flat."""
    settings: dict = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() == 1:
                # Gemma's norms multiply by 1 + weight
                torch.nn.init.normal_(parameter, mean=0.0 if "Gemma" in model_class.__name__ else 1.0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.15)
    model.tie_weights()
    return model.eval()


def tiny_run(folder: Path, base: Path, **lora: object) -> Path:
    """A run folder as training leaves it, around an adapter with random numbers in it.

    `base` is a model folder or a GGUF file whose tokenizer is `tiny_tokenizer()`; `lora` are PEFT's settings.
    """
    from peft import LoraConfig, get_peft_model

    from buleyean_rl.models.weights import load_base

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]} | lora
    model = load_base(str(base))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
