"""Engines that others run: waited for, asked, and neither started nor stopped here."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.engine.client import EngineClient, shorten
from megatron_r1.engine.errors import EngineError
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.fleet import RolloutFleet

POLL_SECONDS = 1.0
ANSWER_SECONDS = 30.0


class ServedFleet(RolloutFleet):
    """A fleet of servers that run already. One that is lost is waited for, as long as one of our
    own may take to start, while the others go on."""

    def __init__(
        self, urls: Sequence[str], log_folder: Path, *, max_model_len: int, **settings: Any
    ) -> None:
        """max_model_len: tokens that each must have room for. settings: of `RolloutFleet`."""
        super().__init__(len(urls), log_folder, max_model_len=max_model_len, **settings)
        self.urls = list(urls)

    def launch(self, index: int) -> Engine:
        server = ServedEngine(self.urls[index], self.server_settings["max_model_len"])
        client = ServedClient(server.url, timeout_seconds=self.request_timeout_seconds)
        return Engine(index, server, client, role=self.role)


class ServedClient(EngineClient):
    async def set_version(self, version: int) -> None:
        """Its weights are not ours to name."""


class ServedEngine:
    """A vLLM server that others run, with the interface of `EngineServer`. Whether it lives is
    noticed by its answers only."""

    is_lost = False
    """It is the same server that may come back, so it is waited for."""

    def __init__(self, url: str, max_model_len: int) -> None:
        self.url, self.max_model_len = url.rstrip("/"), max_model_len

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def is_alive(self) -> bool:
        return True

    def describe_end(self) -> str:
        return f"{self.url} is not ours to end"

    def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Block until the server answers and has shown that it can score.

        Raises:
            EngineError: it does not answer in time, has too little room, or cannot score tokens.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                [card, *_] = self._ask("/v1/models")["data"]
                break
            except (OSError, ValueError, KeyError) as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{self.url}: no vLLM server answers after {timeout_seconds:.0f} seconds: "
                        f"{error}"
                    ) from error
                time.sleep(POLL_SECONDS)
        room = card.get("max_model_len")
        if room is not None and room < self.max_model_len:
            raise EngineError(
                f"{self.url} has room for {room} tokens, {self.max_model_len} are needed: start it "
                f"with --max-model-len {self.max_model_len}"
            )
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        try:
            self._ask("/inference/v1/generate", {"token_ids": [0, 0], "sampling_params": sampling})
        except (OSError, ValueError) as error:
            told = shorten(error.read()) if isinstance(error, urllib.error.HTTPError) else ""
            raise EngineError(
                f"{self.url}/inference/v1/generate: {error} {told}: start the server with "
                "--enable-scale-out, which brings this address"
            ) from error

    def _ask(self, path: str, body: dict | None = None) -> Any:
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, payload, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)
