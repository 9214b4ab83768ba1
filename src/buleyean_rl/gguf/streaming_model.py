"""A transformers model that computes with the weights of a GGUF file, without having them all in memory.

    GGUF tensors --LazyTensor--> one module's parameters, while that module computes --> log-probabilities

The model is a skeleton. Each module reads its weights before its forward pass and drops them after it, so the
reference of the parity gate needs the largest weight in fp32, and the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from buleyean_rl.errors import ParityError
from buleyean_rl.gguf.tensors import LazyTensor
from buleyean_rl.models.skeleton import LM_HEAD, build_skeleton


class StreamingModel:
    """A model that reads its parameters when it needs them.

    Args:
        module: without weights.
        parameters: by name.
    """

    def __init__(self, module: Any, parameters: Mapping[str, LazyTensor]) -> None:
        self._model, self._parameters = module, parameters
        for path, module in self._model.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                _StreamedWeights(self, f"{path}." if path else "", names).attach(module)

    @classmethod
    def from_config(cls, config: Any, parameters: Mapping[str, LazyTensor]) -> StreamingModel:
        """The model of a transformers configuration; without an output matrix the embedding is used."""
        head = parameters.get(LM_HEAD, parameters["model.embed_tokens.weight"])
        return cls(build_skeleton(config), {**parameters, LM_HEAD: head})

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """Log-probabilities of the next token after prefixes of sequences.

        Args:
            sequences: token ids.
            lengths: of the prefixes, some for each sequence.

        Returns:
            One array per sequence. Shape: (lengths, vocabulary).
        """
        width = max(map(len, sequences))
        # attention is causal: padding on the right changes no position before it
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
        positions = sorted({length - 1 for prefixes in lengths for length in prefixes})
        with torch.inference_mode():
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(positions)).logits
        columns = [[positions.index(length - 1) for length in prefixes] for prefixes in lengths]
        return [logits[i, column].float().log_softmax(-1).numpy() for i, column in enumerate(columns)]

    def read_weight(self, parameter: str) -> Tensor:
        """Read a parameter of the model.

        Raises:
            ParityError: the file lacks it.
        """
        if parameter not in self._parameters:
            raise ParityError(f"the model's {parameter} is missing in the file")
        return self._parameters[parameter].read_all()


class _StreamedWeights:
    """The hooks that read a module's weights before its forward pass and drop them afterwards."""

    def __init__(self, model: StreamingModel, prefix: str, names: list[str]) -> None:
        self.model, self.prefix, self.names = model, prefix, names

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.read)
        module.register_forward_hook(self.drop)

    def read(self, module: nn.Module, _inputs: Any) -> None:
        for name in self.names:
            weight = self.model.read_weight(f"{self.prefix}{name}")
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def drop(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        for name in self.names:
            module.register_parameter(name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))


class ModelInMemory:
    """A transformers or PEFT model in memory, as a reference."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """See `StreamingModel.logprobs`."""
        logprobs = []
        for ids, prefixes in zip(sequences, lengths, strict=True):
            with torch.inference_mode():
                rows = self._model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            logprobs.append(rows[[length - 1 for length in prefixes]].numpy())
        return logprobs
