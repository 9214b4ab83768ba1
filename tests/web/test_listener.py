"""The address of a server, and who needs a token."""

from __future__ import annotations

import socket

import httpx2
import pytest

from buleyean_rl.errors import UsageError
from buleyean_rl.web.access import choose_token
from buleyean_rl.web.listener import listen, urls

VARIABLE = "A_TOKEN"


def test_only_this_machines_addresses_go_without_a_token() -> None:
    assert choose_token("localhost", VARIABLE) is None
    assert choose_token("localhost", VARIABLE, "chosen") == "chosen"
    assert choose_token("0.0.0.0", VARIABLE)


@pytest.mark.parametrize("token", ["žluť", "two words", "line\n"])
def test_a_token_that_no_client_can_show_is_refused(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, token)
    with pytest.raises(UsageError, match="ASCII"):
        choose_token("0.0.0.0", VARIABLE)


def test_answers_go_out_at_once() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio knows to switch Nagle's algorithm off


def test_the_addresses_that_are_printed_open() -> None:
    assert urls("127.0.0.1", 7860) == ["http://127.0.0.1:7860/"]
    assert urls("::1", 7860) == ["http://[::1]:7860/"]
    with listen("0.0.0.0", 0) as listener:
        port = listener.getsockname()[1]
        addresses = urls("0.0.0.0", port)
        assert addresses[0] == f"http://127.0.0.1:{port}/"
        for url in addresses:
            socket.create_connection((httpx2.URL(url).host, port), timeout=10).close()
