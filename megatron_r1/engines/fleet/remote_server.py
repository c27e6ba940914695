"""One engine on another host, or on several, with the interface of `EngineServer`."""

import time
from pathlib import Path
from typing import Any

from megatron_r1.engines.fleet.host_pool import HostPool, RemoteEngine
from megatron_r1.engines.server.client import is_healthy
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.server import Server

REMOTE_STOP_SECONDS = 15.0
"""An engine gets 5 seconds to end by itself; a host that reports nothing for longer counts as
gone."""


class RemoteServer(Server):
    """An engine that is started on any host that has room, now or later."""

    poll_seconds = 0.1

    def __init__(self, pool: HostPool, model: Path, log_path: Path, **settings: Any) -> None:
        """Prepare the engine; `start` orders it.

        Args:
            pool: the hosts.
            model: the model's folder.
            log_path: the engine's log.
            **settings: the settings, as for `RemoteEngine`."""
        self.pool = pool
        self.engine = RemoteEngine(model, log_path, pool.hosts_per_engine, settings)
        self._is_stopped = False

    @property
    def is_lost(self) -> bool:
        """Whether the engine, or the host it runs on, was lost."""
        return bool(self.engine.lost_because)

    @property
    def url(self) -> str:
        """The address, known once the host has started the server (after `wait_ready`).

        Raises:
            EngineError: no host has started the server.
        """
        if not self.engine.url:
            raise EngineError("the engine has not been started on any host yet")
        return self.engine.url

    def start(self) -> None:
        """Queue this engine for a host and return at once."""
        self.pool.add(self.engine)

    def is_alive(self) -> bool:
        """Return whether the engine runs or waits for hosts."""
        return not (self._is_stopped or self.engine.describe_end())

    def stop(self) -> None:
        """Stop the engine, and wait until its hosts report that; harmless if it has ended."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.pool.remove(self.engine)
        deadline = time.monotonic() + REMOTE_STOP_SECONDS
        while self.pool.still_has(self.engine) and time.monotonic() < deadline:
            time.sleep(self.poll_seconds)

    def describe_end(self) -> str:
        """Return how the engine ended, or that it did not."""
        state_text = "it was stopped" if self._is_stopped else "it is still running"
        return self.engine.describe_end() or state_text

    async def _is_ready(self) -> bool:
        if self.pool.refusal and not self.engine.host_names:
            raise EngineError(self.pool.refusal)
        return bool(self.engine.url) and await is_healthy(self.engine.url)

    def _why_not_ready(self) -> str:
        hosts, parts = self.engine.host_names, self.engine.parts
        if not hosts:
            host_phrase = "host" if len(parts) == 1 else f"{len(parts)} hosts"
            return f"no {host_phrase} had room for it ({self.pool.describe()})"
        for part in parts:
            if part.host is not None and (part.report is None or part.report.state != "running"):
                return f"host {part.host.name} has not started it"
        return (
            f"it runs on host {hosts}, but {self.url} does not answer this host: it still loads "
            f"(its log: {self.engine.log_path}), or a firewall is between them"
        )
