"""Parts of a causal model: decoder, output head; the base without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from buleyean_rl.errors import ModelError
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.private_interfaces import adapters_disabled


def backbone(model: Any) -> nn.Module:
    """The decoder of a causal model, PEFT or plain, without its output head."""
    plain = plain_model(model)
    return getattr(plain, plain.base_model_prefix)


def plain_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT names both its `peft_config`


def share_weights(model: Any) -> Any:
    """Another model of the same weights, which are not copied; its modules and its configuration are its own.

    Args:
        model: whose layers are not fused: a replaced `forward` is bound to its own module.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode within the context; restores the mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Adapter disabled and evaluation mode within the context; restores both."""
    training_states = [vars(module) for module in model.modules() if module.training]
    for state in training_states:
        state["training"] = False
    try:
        with adapters_disabled(model):
            yield
    finally:
        for state in training_states:
            state["training"] = True


def output_head(model: Any) -> OutputHead:
    """The output head of a causal model, checked against the model's own logits.

    Raises:
        ModelError: the model transforms its logits in a way that `OutputHead` does not.
    """
    plain = plain_model(model)
    config, linear = plain.config, plain.get_output_embeddings()
    if linear is None:
        raise ModelError(f"{type(plain).__name__} has no output head: only causal language models train")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = OutputHead(linear.weight.detach(), getattr(linear, "bias", None), scale, softcap)
    ids = torch.arange(1, 9, device=linear.weight.device).unsqueeze(0) % linear.weight.shape[0]
    with eval_mode(model), torch.no_grad():
        ours = head(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
        theirs = plain(input_ids=ids, use_cache=False).logits[0].float()
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise ModelError(
            f"{type(plain).__name__} transforms its logits in a way that is not supported, "
            "so its loss would be wrong: use another model"
        )
    return head
