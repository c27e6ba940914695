"""The controller's records of engine hosts and of the engines that it places on them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.engine.settings import EnginePart
from megatron_r1.fleet.hosts.wire import EngineOrder, EngineReport, HostReport


@dataclass(eq=False)
class HostRecord:
    """The controller's record of one engine host. heard, reached: when its last report
    arrived, and when a message to it was last accepted (time.monotonic); assigned: by the engine's
    name, the parts that it runs; num_deaths: of these, those that ended here without an order."""

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
    """The part of `engine` that one host runs: all of it, or an equal share. host: None while it
    waits for one; report: the host's last; ended: when that first reported its end
    (time.monotonic)."""

    engine: RemoteEngine
    index: int
    host: HostRecord | None = None
    report: EngineReport | None = None
    ended: float | None = None


class RemoteEngine:
    """An engine that should run on hosts of a pool. Once a host of it is lost or a part of it has
    ended, it never runs again, even if that host comes back.

    loss: which of its hosts is lost, and how that was noticed. first_ended: the part whose end
    ended the engine."""

    def __init__(
        self, model: Path, log_path: Path, num_hosts: int, settings: dict[str, Any]
    ) -> None:
        """num_hosts: the engine is spread over so many, and gets them all at once. settings: of
        `EngineSettings`, but for host, port, part and GPUs, which its hosts set."""
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
        """Return the order for the host of a part, or None while the coordinator's address is not
        known, which the first part reports and the others need."""
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
        """Return how it ended, as its hosts report it; empty while it may run."""
        part = self.first_ended
        if self.loss or part is None:
            return self.loss
        assert part.host is not None and part.report is not None
        return f"on host {part.host.name}: {part.report.end}"


def choose_hosts(free: dict[HostRecord, int], count: int) -> list[HostRecord]:
    """Return `count` hosts for an engine, or none if there are not enough: those where fewest
    engines died, and of these the ones with most room. free: slots of each host."""
    able = [host for host, slots in free.items() if slots > 0]
    able.sort(key=lambda host: (host.num_deaths, -free[host]))
    return able[:count] if len(able) >= count else []
