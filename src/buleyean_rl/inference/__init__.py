"""Inference engines: one small protocol, and what implements it.

An engine turns text into token ids, messages into a prompt, prompts into answers, and token ids into
log-probabilities; everything above it (chat, demo, parity gate, evaluation) is written against `Engine`
alone. `LlamaCppEngine` runs a GGUF file in llama.cpp, inside this process, and `LlamaCppPythonEngine` does so
through llama-cpp-python; `TransformersEngine` runs a model that is already in memory; `EndpointEngine` asks a
server elsewhere for answers and nothing more. All but the last answer greedily with the same text where the
weights are the same.

    messages --render--> text --tokenize--> ids --> generate, complete_many, answer_many, top_logprobs, logprobs

An engine is not a tokenizer or a model loader: it is handed a file, or a model.
"""
