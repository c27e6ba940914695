"""A fleet of vLLM servers that others have started, and which are neither started nor stopped here.
Their weights are never replaced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.client import GENERATE_PATH, EngineClient
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.server import RunningServer

EXTERNAL_ANSWER_SECONDS = 30.0
"""The time limit of a request that checks a server."""


class ExternalFleet(EngineFleet):
    """A fleet of servers that run already. A lost one may return within the time that an engine
    gets to start; the others go on meanwhile.

    Args:
        urls: the addresses of the servers.
        log_folder: the folder for what the fleet writes of them.
        max_model_len: the tokens that each server must have room for.
        **settings: arguments of `EngineFleet`.
    """

    def __init__(
        self, urls: Sequence[str], log_folder: Path, *, max_model_len: int, **settings: Any
    ) -> None:
        super().__init__(len(urls), log_folder, max_model_len=max_model_len, **settings)
        self.urls = list(urls)

    def launch(self, index: int) -> Engine:
        """Return the engine at the URL `index`, which runs already."""
        server = ExternalServer(self.urls[index], self.server_settings["max_model_len"])
        client = ExternalClient(server.url, timeout_seconds=self.request_timeout_seconds)
        return Engine(index, server, client, role=self.role)


class ExternalClient(EngineClient):
    """A client that does not rename the server's weights."""

    async def set_policy_version(self, policy_version: int) -> None:
        """Do nothing: an engine that is not ours has no version of our weights."""


class ExternalServer(RunningServer):
    """A server that runs already. Only its answers show whether it is alive."""

    poll_seconds = 1.0

    def __init__(self, url: str, max_model_len: int) -> None:
        super().__init__(url.rstrip("/"))
        self.max_model_len = max_model_len
        self._failure: Exception | None = None

    async def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Wait until the server answers, and check that it can compute log-probabilities.

        Raises:
            EngineError: the server does not answer in time, has too little room, or cannot
                compute them.
        """
        await super().wait_ready(timeout_seconds)
        async with EngineClient(self.url, timeout_seconds=EXTERNAL_ANSWER_SECONDS) as client:
            sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
            call = {"token_ids": [0, 0], "sampling_params": sampling}
            try:
                await client.request("POST", GENERATE_PATH, call)
            except EngineError as error:
                raise EngineError(
                    f"{error}: start the server with --enable-scale-out, which adds this address"
                ) from error

    async def _is_ready(self) -> bool:
        try:
            async with EngineClient(self.url, timeout_seconds=EXTERNAL_ANSWER_SECONDS) as client:
                [card, *_] = msgspec.json.decode(await client.request("GET", "/v1/models"))["data"]
        except (EngineError, ValueError, KeyError) as error:
            self._failure = error
            return False
        room = card.get("max_model_len")
        if room is not None and room < self.max_model_len:
            raise EngineError(
                f"{self.url} has room for {room} tokens, {self.max_model_len} are needed: start it "
                f"with --max-model-len {self.max_model_len}"
            )
        return True

    def _why_not_ready(self) -> str:
        return f"{super()._why_not_ready()}: {self._failure}"
