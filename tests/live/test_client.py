"""What `buleyean swap` makes of replies that are not its server's."""

from __future__ import annotations

from typing import Any

import pytest

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint_client import EndpointClient, Reply
from buleyean_rl.live.client import swap


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b"<html>", "none of `buleyean serve`"),
        (200, b"[]", "none of `buleyean serve`"),
        (200, b'{"ok": true}', "none of `buleyean serve`"),
        (502, b"", "status 502"),
        (502, b"two\nlines of s3cret", "two lines of .key."),
    ],
)
def test_another_programs_reply_is_told_in_a_line(
    status: int, body: bytes, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(*_: Any) -> Reply:
        return Reply(status, {}, body)

    monkeypatch.setattr(EndpointClient, "send", send)
    with pytest.raises(EngineError, match=error):
        swap("http://127.0.0.1:1", "s3cret", None)


def test_a_server_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:1")
    with pytest.raises(EngineError, match="is `buleyean serve` there") as refused:
        swap("http://127.0.0.1:1", "", None)
    assert "Name or service" not in str(refused.value)
