"""An engine on another host, with the interface of `EngineServer`."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.rollout.errors import EngineError
from megatron_r1.rollout.host_wire import EngineOrder, EngineReport

if TYPE_CHECKING:
    from megatron_r1.rollout.host_pool import HostPool

POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
"""An engine has 5 seconds to end by itself; a host that says nothing for longer is as good as
gone."""


class RemoteServer:
    """A place for an engine in a pool of hosts. It is started wherever there is room, now or later,
    and once its host is lost or it has ended it never lives again, even if the host comes back.

    The methods may be called from any thread.
    """

    def __init__(self, pool: HostPool, model: Path, log_path: Path, **settings: Any) -> None:
        """settings: of `EngineServer`, but for host, port and GPUs, which are its host's."""
        self.pool = pool
        self.order = EngineOrder(
            uuid.uuid4().hex, str(Path(model).resolve()), str(Path(log_path).resolve()), settings
        )
        self.host_name = ""
        """Of the host it was given; empty while it waits for one."""
        self.report: EngineReport | None = None
        """What its host said last."""
        self.is_lost = False
        """Its host has vanished, or left."""
        self._is_stopped = False

    @property
    def url(self) -> str:
        """`http://host:port`, known once its host has started it (after `wait_ready`)."""
        if self.report is None or not self.report.url:
            raise EngineError("the engine has not been started on any host yet")
        return self.report.url

    def start(self) -> None:
        """Ask for a place and return at once."""
        self.pool.add(self)

    def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Block until the engine answers this host.

        Raises:
            EngineError: it ended, its host vanished, no host had room, or the time is over.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise EngineError(f"the engine did not start: {self.describe_end()}")
            if self.report is not None and self.report.url and self._answers():
                return
            if self.pool.refusal and not self.host_name:
                raise EngineError(self.pool.refusal)
            time.sleep(POLL_SECONDS)
        why = self._why_not_ready()
        self.stop()
        raise EngineError(f"the engine was not ready after {timeout_seconds:.0f} seconds: {why}")

    def is_alive(self) -> bool:
        """Also while it waits for a host."""
        ended = self.report is not None and self.report.state == "ended"
        return not (self._is_stopped or self.is_lost or ended)

    def stop(self) -> None:
        """End it, and wait until its host says so; harmless if it has ended."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.pool.remove(self)
        deadline = time.monotonic() + STOP_SECONDS
        while self.pool.still_has(self) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def describe_end(self) -> str:
        """How it ended, by its host's word."""
        if self.is_lost:
            return f"host {self.host_name} left, or has not been heard from"
        if self.report is not None and self.report.end:
            return f"on host {self.host_name}: {self.report.end}"
        return "it was stopped" if self._is_stopped else "it is still running"

    def _answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        return False

    def _why_not_ready(self) -> str:
        if not self.host_name:
            return f"no host had room for it ({self.pool.describe()})"
        if self.report is None or not self.report.url:
            return f"host {self.host_name} has not started it"
        return (
            f"it runs on host {self.host_name}, but {self.url} does not answer this host: it still "
            f"loads (its log: {self.order.log}), or a firewall is between them"
        )
