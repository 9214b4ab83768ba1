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
from buleyean_rl.gguf_export.blueprint import EMBEDDING, Blueprint, skeleton
from buleyean_rl.gguf_export.tensors import Rows


class Reference:
    """What a file's weights should say.

    Args:
        blueprint: whose configuration, and which tensor each parameter is.
        stored: the file's tensors by GGUF name.
    """

    def __init__(self, blueprint: Blueprint, stored: Mapping[str, Rows]) -> None:
        self._model = skeleton(blueprint.config)
        self._layouts, self._stored = blueprint.layouts, stored
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
        """A parameter of the model, from the file."""
        layouts = self._layouts
        if parameter == "lm_head.weight" and parameter not in layouts:  # the embedding, by leaving it out
            parameter = next(name for name, layout in layouts.items() if layout.name == EMBEDDING)
        if parameter not in layouts or layouts[parameter].name not in self._stored:
            raise ParityError(f"the model's {parameter} is missing in the file")
        return layouts[parameter].restore(self._stored[layouts[parameter].name].whole())


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
