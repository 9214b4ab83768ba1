"""Inference engines: one small protocol and its implementations.

An engine turns text into token ids, messages into a prompt, prompts into answers, and token ids into
log-probabilities; chat, demo, parity gate and evaluation use `Engine` alone. `LlamaCppEngine` runs a GGUF file
in llama.cpp, inside this process, `LlamaCppPythonEngine` does so through llama-cpp-python, `TransformersEngine`
runs a model that is in memory, and `EndpointEngine` requests answers, and only answers, from a server. With the
same weights all but the last give the same greedy answers.

    messages --render--> text --tokenize--> ids --> generate, complete_many, answer_many, top_logprobs, logprobs

An engine is no model loader: its argument is a file, or a loaded model.
"""
