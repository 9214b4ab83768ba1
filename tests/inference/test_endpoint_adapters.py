"""vLLM is given adapters by its documented calls; a server that cannot take one is given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint_adapters import AdapterEngine
from buleyean_rl.inference.endpoint_server import Endpoint, Patience
from vllm import Vllm, standing_in_for_vllm

CONVERSATIONS = [[{"role": "user", "content": f"prompt {number}"}] for number in range(12)]
HASTY = Patience(pause=0.01, retries=1)


@pytest.fixture
def two() -> Iterator[list[Vllm]]:
    with standing_in_for_vllm(str.__add__) as first, standing_in_for_vllm(str.__add__) as second:
        yield [first, second]


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    return str(tmp_path)


def connect(servers: list[Vllm], adapter: str) -> AdapterEngine:
    return AdapterEngine([Endpoint(server.url, 2) for server in servers], "round-1", adapter, patience=HASTY)


def test_an_adapter_is_loaded_asked_and_forgotten_by_every_server(two: list[Vllm], adapter: str) -> None:
    two[1].adapters["round-1"] = Path(adapter)  # left by a walk that was killed
    with closing(connect(two, adapter)) as engine:
        assert engine.complete_many(CONVERSATIONS) == [f"round-1prompt {number}" for number in range(12)]
    for server in two:
        kinds = [call for call, _ in server.calls]
        assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("load", "unload", {"answer"})
        assert {name for _, name in server.calls} == {"round-1"}
        assert not server.adapters


def test_a_server_that_takes_no_adapter_is_given_up(two: list[Vllm], adapter: str) -> None:
    two[0].can_load = False
    with closing(connect(two, adapter)) as engine:
        assert len(engine.complete_many(CONVERSATIONS)) == 12
    assert two[0].calls == []
    two[1].can_load = False
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        connect(two, adapter)


def test_a_folder_that_the_server_does_not_see_is_an_error(two: list[Vllm]) -> None:
    with pytest.raises(EngineError, match="No adapter found for /nowhere"):
        connect(two[:1], "/nowhere")
