"""An engine on another host, or on several, with the interface of `EngineServer`."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.part import Part
from megatron_r1.fleet.hosts.places import Host
from megatron_r1.fleet.hosts.wire import EngineOrder, EngineReport

if TYPE_CHECKING:
    from megatron_r1.fleet.hosts.pool import HostPool

POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
"""An engine has 5 seconds to end by itself; a host that says nothing for longer is as good as
gone."""


@dataclass(eq=False)
class RemotePart:
    """What one host runs of an engine: all of it, or an equal share. host: None while it waits for
    one; report: what that said last; ended: when it said that this has ended (time.monotonic)."""

    index: int
    host: Host | None = None
    report: EngineReport | None = None
    ended: float | None = None


class RemoteServer:
    """An engine that is started wherever there is room, now or later. Once a host of it is lost or
    a part of it has ended, it never lives again, even if that host comes back.

    The methods may be called from any thread.
    """

    def __init__(
        self, pool: HostPool, model: Path, log_path: Path, num_hosts: int = 1, **settings: Any
    ) -> None:
        """
        Args:
            num_hosts: it is spread over so many, all of which it gets at once.
            settings: of `EngineSettings`, but for host, port, part and GPUs, which are its hosts'.
        """
        self.pool = pool
        self.name = uuid.uuid4().hex
        """No other engine's."""
        self.model, self.log_path = Path(model).resolve(), Path(log_path).resolve()
        self.settings = settings
        self.parts = [RemotePart(index) for index in range(num_hosts)]
        self.loss = ""
        """Which of its hosts is no longer there, and how that showed."""
        self.first_ended: RemotePart | None = None
        """The part that made it end."""
        self._is_stopped = False

    @property
    def is_lost(self) -> bool:
        """A host of it has vanished, or left."""
        return bool(self.loss)

    @property
    def host_name(self) -> str:
        """Of the hosts it was given, the one that serves first; empty while it waits for them."""
        return ", ".join(part.host.report.name for part in self.parts if part.host is not None)

    @property
    def url(self) -> str:
        """`http://host:port`, known once its host has started it (after `wait_ready`)."""
        report = self.parts[0].report
        if report is None or not report.url:
            raise EngineError("the engine has not been started on any host yet")
        return report.url

    def order(self, part: RemotePart) -> EngineOrder | None:
        """What the host of a part is told. None: nothing yet, as the first part has not said where
        the others are to come to."""
        settings = (self.name, str(self.model), str(self._log(part)), self.settings)
        if len(self.parts) == 1:
            return EngineOrder(*settings)
        first = self.parts[0].report
        coordinator = first.coordinator if first is not None and part.index else ""
        if part.index and not coordinator:
            return None
        return EngineOrder(*settings, Part(part.index, len(self.parts), coordinator))

    def start(self) -> None:
        """Ask for a place and return at once."""
        self.pool.add(self)

    def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Block until the engine answers this host.

        Raises:
            EngineError: it ended, a host of it vanished, no host had room, or the time is over.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise EngineError(f"the engine did not start: {self.describe_end()}")
            if self._answers():
                return
            if self.pool.refusal and not self.host_name:
                raise EngineError(self.pool.refusal)
            time.sleep(POLL_SECONDS)
        why = self._why_not_ready()
        self.stop()
        raise EngineError(f"the engine was not ready after {timeout_seconds:.0f} seconds: {why}")

    def is_alive(self) -> bool:
        """Also while it waits for hosts."""
        return not (self._is_stopped or self.loss or self.first_ended)

    def stop(self) -> None:
        """End it, and wait until its hosts say so; harmless if it has ended."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.pool.remove(self)
        deadline = time.monotonic() + STOP_SECONDS
        while self.pool.still_has(self) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def describe_end(self) -> str:
        """How it ended, by its hosts' word."""
        if self.loss:
            return self.loss
        if self.first_ended is not None:
            return f"on host {self.first_ended.host.report.name}: {self.first_ended.report.end}"
        return "it was stopped" if self._is_stopped else "it is still running"

    def _log(self, part: RemotePart) -> Path:
        """Each has its own, as hosts may share the folder."""
        name = self.log_path
        return name if part.index == 0 else name.with_stem(f"{name.stem}-part-{part.index}")

    def _answers(self) -> bool:
        with contextlib.suppress(EngineError, urllib.error.URLError, OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        return False

    def _why_not_ready(self) -> str:
        if not self.host_name:
            count = len(self.parts)
            hosts = "host" if count == 1 else f"{count} hosts"
            return f"no {hosts} had room for it ({self.pool.describe()})"
        for part in self.parts:
            if part.report is None or part.report.state != "running":
                return f"host {part.host.report.name} has not started it"
        return (
            f"it runs on host {self.host_name}, but {self.url} does not answer this host: it still "
            f"loads (its log: {self.log_path}), or a firewall is between them"
        )
