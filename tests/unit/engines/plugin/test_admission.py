"""Which requests an engine answers."""

import asyncio

import pytest

from megatron_r1.engines.plugin.serve import SECRET_VARIABLE, SecretMiddleware


def answered(monkeypatch, kind, path, *authorization):
    """Whether the application was called, and what was sent instead."""
    monkeypatch.setenv(SECRET_VARIABLE, "secret")
    called, sent = [], []

    async def application(scope, receive, send):
        called.append(scope)

    async def send(message):
        sent.append((message["type"], message.get("status") or message.get("code")))

    headers = [(b"authorization", value) for value in authorization]
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(SecretMiddleware(application)(scope, None, send))
    return bool(called), sent[:1]


@pytest.mark.parametrize("given", [(), (b"",), (b"Bearer",), (b"Bearer secre",), (b"secret",)])
def test_requests_without_the_whole_secret_are_refused(monkeypatch, given):
    refused = False, [("http.response.start", 401)]
    assert answered(monkeypatch, "http", "/collective_rpc", *given) == refused
    closed = False, [("websocket.close", 1008)]
    assert answered(monkeypatch, "websocket", "/v1/realtime", *given) == closed


def test_the_secret_and_a_question_for_the_health_are_let_through(monkeypatch):
    assert answered(monkeypatch, "http", "/collective_rpc", b"Bearer secret") == (True, [])
    assert answered(monkeypatch, "http", "/health") == (True, [])
    assert answered(monkeypatch, "http", "/health/more") == (False, [("http.response.start", 401)])
