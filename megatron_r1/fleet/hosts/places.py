"""Where there is room: what the controller knows of a host, and which hosts an engine gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.fleet.hosts.wire import Report


@dataclass(eq=False)
class Host:
    """heard, reached: when it spoke last, and when its line was last open; given: names of engines
    that it was given, or a part of; num_deaths: of these, that ended here unasked."""

    report: Report
    heard: float
    reached: float
    given: set[str] = field(default_factory=set)
    num_deaths: int = 0

    @property
    def num_free(self) -> int:
        """Places neither given away nor still taken by an engine on its way out."""
        running = {engine.engine for engine in self.report.engines}
        return self.report.num_engines - len(running | self.given)


def chosen(free: dict[Host, int], count: int) -> list[Host]:
    """So many hosts for an engine: those where fewest engines died; of these the ones with most
    room. Empty where there are not enough. free: places on each."""
    able = [host for host, places in free.items() if places > 0]
    able.sort(key=lambda host: (host.num_deaths, -free[host]))
    return able[:count] if len(able) >= count else []
