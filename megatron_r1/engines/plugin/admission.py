"""Requests to an engine must carry its secret.

vLLM's own check (VLLM_API_KEY) does not cover the calls that pause an engine, replace its weights
or run a method by name in its workers."""

import os
import secrets
from typing import Any

SECRET = "VLLM_API_KEY"
"""Environment variable. vLLM's own, so that both checks use one secret."""
OPEN = ("/health",)


class Admission:
    """ASGI middleware: 401 for requests, except to `OPEN`, without `Authorization: Bearer SECRET`;
    websockets are closed."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[SECRET]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN or self._is_authorized(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b"this engine belongs to a run: requests need its secret\n"
            await send({"type": "http.response.body", "body": body})

    def _is_authorized(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self.expected)
