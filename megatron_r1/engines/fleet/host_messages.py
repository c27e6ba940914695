"""Messages between the controller and engine hosts: msgpack, no pickles.

Both sides repeat what is and what should be, and act on the difference. So a lost message, a broken
connection and a restarted peer need no cases of their own."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_r1.engines.server.settings import EnginePart

REPORT_SECONDS = 1.0
"""Longest time between two messages of either side."""


class EngineReport(msgspec.Struct, frozen=True):
    """One engine of a host, or its part of one.

    Attributes:
        engine: the engine's name.
        state: "running", "stopping" or "ended".
        url: reachable from other hosts, empty before its process started and for a part without the
            API server.
        end_reason: how it ended and an excerpt of its log, with state "ended" only.
        coordinator: where the other parts connect, from the first part only."""

    engine: str
    state: Literal["running", "stopping", "ended"]
    url: str = ""
    end_reason: str = ""
    coordinator: str = ""


class HostReport(msgspec.Struct, frozen=True):
    """Host → controller: what runs there.

    Attributes:
        name: the host's name.
        num_engines: the host's slots, for engines or parts of engines.
        shared_memory: the identity of its /dev/shm, the same only for hosts that share it.
        engines: the engines, or parts of engines, that it runs.
        is_leaving: the host is about to exit."""

    name: str
    num_engines: int
    shared_memory: str
    engines: list[EngineReport] = []
    is_leaving: bool = False


class EngineOrder(msgspec.Struct, frozen=True):
    """An engine that should run.

    Attributes:
        engine: the engine's name.
        model: the model's folder.
        log: the path of the engine's log.
        settings: fields of `EngineSettings`, except those that the host sets.
        part: the part that the host runs, of an engine over several hosts."""

    engine: str
    model: str
    log: str
    settings: dict[str, Any] = {}
    part: EnginePart | None = None


class HostOrders(msgspec.Struct, frozen=True):
    """Controller → host: the engines that should run there, and no others.

    Attributes:
        silence_seconds: the time without a message from the controller after which the host stops
            its engines.
        engines: those that should run.
        is_finished: the run is over, and the host is no longer needed.
        refusal: why this host cannot serve this run."""

    silence_seconds: float
    engines: list[EngineOrder] = []
    is_finished: bool = False
    refusal: str = ""


def shared_memory_identity() -> str:
    """Return the kernel's name of this process's /dev/shm, the same wherever it is shared."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{Path('/dev/shm').stat().st_dev}"
