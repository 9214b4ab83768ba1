"""One model: its source, module, tokenizer, head and layout, and what it computes with, each determined once.

    name --open_model--> Model --attach_adapter--> the same Model, ready to train

Commands open one and pass it on. What is expensive (weights, output head, layout, fingerprint) is determined on first
use, so that nothing is loaded for a request that fails its checks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from buleyean_rl.errors import ModelError
from buleyean_rl.kernels import abi, build
from buleyean_rl.kernels.quantised import stored_bytes
from buleyean_rl.models import views
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.layout_probe import Layout, probe_layout
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.placement import default_device, load_for_inference, preferred_bits, preferred_dtype
from buleyean_rl.models.run_folder import attach_run, check_files, find_model, run_tokenizer
from buleyean_rl.models.source import Source
from buleyean_rl.models.weight_checks import check_token_ids
from buleyean_rl.models.weights import load_base, load_config, load_tokenizer
from buleyean_rl.system.host import library_versions
from buleyean_rl.system.wording import counted

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class Model:
    """A causal language model with its tokenizer, on a device.

    Args:
        source: its location.
        device: None for a GPU if there is one.
        dtype: of its weights; None for the fastest on the device.
        keep_adapter: do not merge a run's adapter into the base, so that it can be disabled.
        base_bits: of a number of its base's matrices: 4, 8 or 16; None for a run's own, or by `preferred_bits`.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        keep_adapter: bool = False,
        base_bits: int | None = None,
    ) -> None:
        self.source, self.device = source, device or default_device()
        self._dtype, self._switchable, self._base_bits = dtype, keep_adapter, base_bits
        self._sharing: Model | None = None  # whose base it takes

    @classmethod
    def from_module(cls, module: Any, tokenizer: Any = None) -> Model:
        """A transformers or PEFT model in memory.

        Args:
            module: its layers are not fused.
            tokenizer: None where none is needed.
        """
        plain = views.plain_model(module)
        model = cls(Source(type(plain).__name__, plain.name_or_path), plain.device, plain.dtype)
        vars(model).update(module=module, tokenizer=tokenizer)  # in place of the cached properties
        return model

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of its weights.

        Raises:
            ModelError: its configuration cannot be loaded.
        """
        if self._sharing is not None:
            return self._sharing.dtype
        return self._dtype or preferred_dtype(self.source, self.device)

    @cached_property
    def base_bits(self) -> int | None:
        """Of a number of its base's matrices; None where they stay in a GGUF file's blocks.

        Raises:
            ModelError: its configuration cannot be loaded.
        """
        if self._sharing is not None:
            return self._sharing.base_bits
        return preferred_bits(self.source, self.device, self.dtype, self._base_bits)

    @cached_property
    def tokenizer(self) -> Any:
        """Its transformers tokenizer; the model's files are checked before it is loaded.

        Raises:
            ModelError: it cannot be loaded, or the model's files are not right.
        """
        check_files(self.source)
        tokenizer = load_tokenizer(self.source) if self.source.run is None else run_tokenizer(self.source)
        check_token_ids(self.source.name, tokenizer, load_config(self.source).get_text_config().vocab_size)
        return tokenizer

    @cached_property
    def module(self) -> Any:
        """The transformers model, or with an adapter the PEFT model around it.

        Raises:
            ModelError: it cannot be loaded.
        """
        if self.source.run is not None and not self._switchable and self.base_bits == 16:  # others cannot be merged
            return load_for_inference(self.source, self.device, self.dtype)
        if self.source.run is not None:
            check_files(self.source)
        module = views.share_weights(self.base_module)
        if self.source.run is not None:
            module = attach_run(module, self.source).to(self.device)
        fuse_layers(views.plain_model(module))
        return module

    @cached_property
    def base_module(self) -> Any:
        """Its base model, whose weights `module` shares; no layer of it is fused, and it stays as it was loaded.

        Raises:
            ModelError: it cannot be loaded.
        """
        if self._sharing is not None:
            return self._sharing.base_module
        return load_base(self.source, self.dtype, self.base_bits).to(self.device)

    def with_source(self, source: Source) -> Model:
        """A model on the same base, which is loaded once for both: the base itself, or a run, whose adapter is kept.

        Args:
            source: of the base, or of a run of it.
        """
        model = Model(source, self.device, keep_adapter=True)
        model._sharing = self._sharing or self
        return model

    @property
    def base(self) -> Model:
        """The model without an adapter, on the same weights."""
        return self.with_source(self.source.base or self.source)

    @property
    def plain(self) -> Any:
        """The transformers model, without PEFT's wrapper."""
        return views.plain_model(self.module)

    @property
    def backbone(self) -> nn.Module:
        """Its decoder, without the output head."""
        return views.backbone(self.module)

    @cached_property
    def head(self) -> OutputHead:
        """Its output head, checked against its own logits.

        Raises:
            ModelError: it transforms its logits in a way that `OutputHead` does not.
        """
        return views.output_head(self.module)

    @cached_property
    def layout(self) -> Layout:
        """The layout of its sequences: packed, or padded where its attention cannot be replaced."""
        return probe_layout(self.module)

    @cached_property
    def kernels(self) -> build.KernelStatus:
        """Whether the C kernels are built, and for which instruction set."""
        return build.status()

    @cached_property
    def numerics(self) -> dict[str, Any]:
        """All that decides, to the last bit, what its base computes on this machine; JSON values."""
        library = self.kernels.library
        return {
            "weights": self.source.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if self.base_bits == 16 else {"base_bits": self.base_bits}),
            "device": self._describe_device(),
            "kernels": f"{self.kernels.instruction_set} {library.stem[:12]}" if library else "off",
            "vectors": torch.backends.cpu.get_cpu_capability(),  # of torch's own kernels
            "threads": torch.get_num_threads(),
            **{f"{name} version": version for name, version in sorted(library_versions().items())},
        }

    @property
    def numerics_key(self) -> list[Any]:
        """The values of `numerics`, for a cache key."""
        return [*self.numerics.values()]

    @property
    def training_numerics(self) -> dict[str, Any]:
        """All that decides, to the last bit, what training it computes on this machine; JSON values."""
        return self.numerics | {"layout": self.layout}

    @property
    def has_adapter(self) -> bool:
        """Whether it is a PEFT model, whose adapter can be disabled."""
        return hasattr(self.module, "peft_config")

    def attach_adapter(self, config: LoraConfig) -> None:
        """Attach a new adapter; the base is frozen.

        Args:
            config: from `lora.lora_config`.

        Raises:
            ModelError: it has no such layers, or has an adapter.
        """
        if self.has_adapter:
            raise ModelError(f"{self.source.name} has an adapter already: train from its base model")
        self.module = attach_lora(self.module, config).to(self.device)
        self.module.peft_config["default"].base_model_name_or_path = self.source.absolute_name
        for name in ("head", "layout"):  # of the module without adapter
            vars(self).pop(name, None)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """The frozen base within the context, in evaluation mode."""
        return views.adapter_disabled(self.module)

    def eval_mode(self) -> AbstractContextManager[None]:
        """No dropout within the context."""
        return views.eval_mode(self.module)

    def describe(self) -> str:
        """What it computes with, in one line.

        For example `compute: bf16, AVX2 kernels, fused decoder, packed sequences, 2 threads`.
        """
        parts = [DTYPE_NAMES.get(self.dtype, str(self.dtype))]
        if self.base_bits != 16:
            weights = [*views.plain_model(self.module).parameters()]
            bits = 8 * sum(map(stored_bytes, weights)) / sum(weight.numel() for weight in weights)
            parts[0] += f" from weights of {bits:.1f} bits"
        on_cpu = self.device.type == "cpu"
        parts.append(self._describe_kernels() if on_cpu else self._describe_device())
        if "forward" in vars(self.backbone):  # which `fuse_decoder` replaces
            dropout = self.has_adapter and self.module.peft_config["default"].lora_dropout
            parts.append("fused decoder" + (" but for steps with LoRA dropout, which are slower" if dropout else ""))
        if self.has_adapter or "layout" in vars(self):  # only training and scoring use it
            parts.append(f"{self.layout} sequences")
        if on_cpu:
            parts.append(counted(torch.get_num_threads(), "thread"))
        return f"compute: {', '.join(parts)}"

    def _describe_device(self) -> str:
        return str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def _describe_kernels(self) -> str:
        if self.kernels.problem is not None:
            return f"no kernels ({self.kernels.problem})"
        if not abi.available(torch.empty(0, dtype=self.dtype)):
            dtype = DTYPE_NAMES.get(self.dtype, self.dtype)
            return f"no kernels (they do not compute this model, or not in {dtype}: several times the time and memory)"
        return f"{self.kernels.instruction_set} kernels"


def open_model(
    name: str | Source,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    keep_adapter: bool = False,
    base_bits: int | None = None,
) -> Model:
    """Open a model by its name.

    Args:
        name: of a base model, or a run folder.
        device: None for a GPU if there is one.
        dtype: of its weights; None for the fastest on the device.
        keep_adapter: see `Model`.
        base_bits: see `Model`.

    Raises:
        ModelError: nothing of that name can exist.
    """
    return Model(find_model(name), device, dtype, keep_adapter=keep_adapter, base_bits=base_bits)
