"""Inference engines: one small protocol, and what implements it.

An engine turns text into token ids, messages into a prompt, prompts into answers, and token ids into
log-probabilities; everything above it (chat, demo, parity gate, evaluation) is written against `Engine`
alone. `LlamaCppEngine` runs a GGUF file in llama.cpp, inside this process; `TransformersEngine` runs a
model that is already in memory; `EndpointEngine` asks a server elsewhere for answers and nothing more. The
first two answer greedily with the same text where the weights are the same.

    messages --render--> text --tokenize--> ids --> generate, complete_many, top_logprobs, logprobs

An engine is not a tokenizer or a model loader: it is handed a file, or a model.
"""

from __future__ import annotations

from buleyean_rl.engines.endpoint import EndpointEngine
from buleyean_rl.engines.gguf_file import check_gguf
from buleyean_rl.engines.in_memory import TransformersEngine
from buleyean_rl.engines.llama_server import LlamaCppEngine
from buleyean_rl.engines.protocol import CONTEXT, GREEDY, Engine, Messages, Sampling, neutral_nll

__all__ = [
    "CONTEXT",
    "GREEDY",
    "EndpointEngine",
    "Engine",
    "LlamaCppEngine",
    "Messages",
    "Sampling",
    "TransformersEngine",
    "check_gguf",
    "neutral_nll",
]
