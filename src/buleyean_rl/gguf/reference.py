"""transformers computing with the weights a GGUF file stores, without holding them.

A model of a configuration has no numbers here. Each of its modules reads its weights as its turn comes and
lets go of them afterwards, so a reference for any model needs one weight in fp32, and the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buleyean_rl.errors import ParityError
from buleyean_rl.gguf.skeleton import HEAD, skeleton
from buleyean_rl.gguf.tensors import Rows


class Reference:
    """A model that reads its parameters when it needs them.

    Args:
        config: of transformers.
        parameters: by name; the output matrix may be missing, and is the embedding then.
    """

    def __init__(self, config: Any, parameters: Mapping[str, Rows]) -> None:
        self._model = skeleton(config)
        self._parameters = dict(parameters)
        self._parameters.setdefault(HEAD, parameters["model.embed_tokens.weight"])
        for path, module in self._model.named_modules():
            names = [name for name, parameter in module._parameters.items() if parameter is not None]
            if names:
                _Loan(self, f"{path}." if path else "", names).attach(module)

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """Log-probabilities of the next token after beginnings of sequences.

        Args:
            sequences: token ids.
            lengths: of the beginnings, some for each sequence.

        Returns:
            One array per sequence. Shape: (lengths, vocabulary).
        """
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])  # nobody looks at what follows
        asked = sorted({length - 1 for chosen in lengths for length in chosen})
        with torch.inference_mode():
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(asked)).logits
        rows = [[asked.index(length - 1) for length in chosen] for chosen in lengths]
        return [logits[i, row].float().log_softmax(-1).numpy() for i, row in enumerate(rows)]

    def weight(self, parameter: str) -> Tensor:
        """A parameter of the model."""
        if parameter not in self._parameters:
            raise ParityError(f"the model's {parameter} is missing in the file")
        return self._parameters[parameter].whole()


class _Loan:
    """A module's weights, there while it computes."""

    def __init__(self, reference: Reference, prefix: str, names: list[str]) -> None:
        self.reference, self.prefix, self.names = reference, prefix, names

    def attach(self, module: Any) -> None:
        module.register_forward_pre_hook(self.fill)
        module.register_forward_hook(self.empty)

    def fill(self, module: Any, _inputs: Any) -> None:
        for name in self.names:
            weight = self.reference.weight(f"{self.prefix}{name}")
            module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)

    def empty(self, module: Any, _inputs: Any, _output: Any) -> None:
        for name in self.names:
            module._parameters[name] = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
