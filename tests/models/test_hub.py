"""Which commit of a Hub model is loaded, and that a Hub which cannot be reached is said at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from buleyean_rl.errors import ModelError
from buleyean_rl.models import hub
from buleyean_rl.models.source import resolve


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests' own switch is off."""
    hub.is_reachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    hub.is_reachable.cache_clear()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("answer", ["refused", "slow"])
def test_without_a_network_a_hub_name_is_one_line_at_once(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        if answer == "slow":
            time.sleep(60)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ModelError, match=r"'org/no-such-model': the Hub cannot be reached and it is not cached"):
        _ = resolve("org/no-such-model").revision


@pytest.mark.usefixtures("online")
def test_a_proxy_stands_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[tuple[str, int]] = []
    monkeypatch.setattr(socket, "create_connection", lambda address, _: addresses.append(address) or socket.socket())
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert hub.is_reachable()
    assert addresses == [("proxy.example", 3128)]


def test_what_the_hub_refuses_is_told_from_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        response = type("Response", (), {"status_code": 404})

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused

    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelError, match="HTTP 404"):
        hub.find_revision("org/no-such-model")
