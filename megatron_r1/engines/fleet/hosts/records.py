"""The controller's records of engine hosts and of the engines that it places on them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.engines.fleet.hosts.wire import EngineOrder, EngineReport, HostReport
from megatron_r1.engines.server.settings import EnginePart


@dataclass(eq=False)
class HostRecord:
    """The controller's record of one engine host.

    heard: when its last report arrived (time.monotonic).
    reached: when the socket last accepted a message to it (time.monotonic).
    assigned: the parts of engines that it runs, by the engine's name.
    num_deaths: the number of engines that a part on this host has ended, without an order."""

    report: HostReport
    heard: float
    reached: float
    assigned: dict[str, RemotePart] = field(default_factory=dict)
    num_deaths: int = 0

    @property
    def name(self) -> str:
        return self.report.name

    @property
    def num_free(self) -> int:
        """Slots neither assigned nor still taken by an engine that is stopping."""
        running = {engine.engine for engine in self.report.engines}
        return self.report.num_engines - len(running | self.assigned.keys())


@dataclass(eq=False)
class RemotePart:
    """The part of `engine` that one host runs: the whole engine, or an equal share. host: None
    while the part waits for a host. report: the host's last report of the part. ended: when the
    host first reported that the part has ended (time.monotonic)."""

    engine: RemoteEngine
    index: int
    host: HostRecord | None = None
    report: EngineReport | None = None
    ended: float | None = None


class RemoteEngine:
    """An engine that should run on hosts of a pool. Once it has lost a host, or a part of it has
    ended, it never runs again, even if the host comes back.

    loss: which host was lost, and how the loss was noticed. first_ended: the part whose end ended
    the engine."""

    def __init__(
        self, model: Path, log_path: Path, num_hosts: int, settings: dict[str, Any]
    ) -> None:
        """num_hosts: the number of hosts over which the engine is spread; it gets all at once.
        settings: fields of `EngineSettings`, except host, port, part and GPUs, which its hosts
        set."""
        self.name = uuid.uuid4().hex
        self.model, self.log_path = Path(model).resolve(), Path(log_path).resolve()
        self.settings = settings
        self.parts = [RemotePart(self, index) for index in range(num_hosts)]
        self.loss = ""
        self.first_ended: RemotePart | None = None

    @property
    def host_names(self) -> str:
        """Its hosts, the serving one first; empty while it waits for them."""
        return ", ".join(part.host.name for part in self.parts if part.host is not None)

    @property
    def url(self) -> str:
        """The address, `http://host:port`; empty until the host has started the part."""
        report = self.parts[0].report
        return report.url if report is not None else ""

    def order(self, part: RemotePart) -> EngineOrder | None:
        """Return the order for the host of a part. Return None while the coordinator's address is
        unknown: the first part reports it, and the other parts need it."""
        log = self.log_path  # parts may share a folder, so each has a file
        if part.index:
            log = log.with_stem(f"{log.stem}-part-{part.index}")
        first = self.parts[0].report
        settings = (self.name, str(self.model), str(log), self.settings)
        if len(self.parts) == 1:
            return EngineOrder(*settings)
        coordinator = first.coordinator if first is not None and part.index else ""
        if part.index and not coordinator:
            return None
        return EngineOrder(*settings, EnginePart(part.index, len(self.parts), coordinator))

    def describe_end(self) -> str:
        """Return how the engine ended, as its hosts report it; "" while it may run."""
        part = self.first_ended
        if self.loss or part is None:
            return self.loss
        assert part.host is not None and part.report is not None
        return f"on host {part.host.name}: {part.report.end}"


def choose_hosts(free: dict[HostRecord, int], count: int) -> list[HostRecord]:
    """Return `count` hosts for an engine, or [] if there are not enough: hosts with the fewest
    deaths first, and among equals those with the most free slots. free: the free slots of each
    host."""
    able = [host for host, slots in free.items() if slots > 0]
    able.sort(key=lambda host: (host.num_deaths, -free[host]))
    return able[:count] if len(able) >= count else []
