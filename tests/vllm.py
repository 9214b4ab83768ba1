"""A stand-in for vLLM that holds calls to its documented schema: adapters that are loaded and unloaded as it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from standin import StandIn, standing_in

BASE = "the-model"


class Vllm:
    """Which adapters it has, and what it was asked, in turn: (call, name of model or adapter)."""

    def __init__(self, server: StandIn, answer: Callable[[str, str], str]) -> None:
        self.url, self._answer = server.url, answer
        self.adapters: dict[str, Path] = {}
        self.calls: list[tuple[str, str]] = []
        self.can_load = True
        server.routes = {
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/v1/chat/completions": self._complete,
        }

    def _load(self, request: dict[str, Any]) -> tuple[int, bytes]:
        if not self.can_load:
            return 404, b'{"detail": "Not Found"}'
        assert request.keys() == {"lora_name", "lora_path"}  # LoadLoRAAdapterRequest
        name, path = request["lora_name"], Path(request["lora_path"])
        self.calls.append(("load", name))
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path.is_absolute() and (path / "adapter_config.json").is_file()):
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        config = json.loads((path / "adapter_config.json").read_bytes())
        assert config["peft_type"] == "LORA"
        assert (path / "adapter_model.safetensors").is_file()
        self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _unload(self, request: dict[str, Any]) -> tuple[int, bytes]:
        assert request.keys() == {"lora_name"}  # UnloadLoRAAdapterRequest; its lora_int_id is not needed
        self.calls.append(("unload", request["lora_name"]))
        if self.adapters.pop(request["lora_name"], None) is None:
            return _error(404, "The lora adapter cannot be found.")
        return 200, b"Success: LoRA adapter removed successfully."

    def _complete(self, request: dict[str, Any]) -> tuple[int, bytes]:
        model = request["model"]
        if model != BASE and model not in self.adapters:
            return _error(404, f"The model `{model}` does not exist.")
        self.calls.append(("answer", model))
        text = self._answer(model, request["messages"][-1]["content"])
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()


@contextmanager
def standing_in_for_vllm(answer: Callable[[str, str], str]) -> Iterator[Vllm]:
    """A server; `answer` makes a text of the model's name and the prompt."""
    with standing_in() as server:
        yield Vllm(server, answer)


def _error(status: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, "type": "BadRequestError", "code": status}}).encode()
