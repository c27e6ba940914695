"""What travels between the controller and the hosts of an engine pool: msgpack, no pickles.

Both sides say over and over what is and what should be, and act on the difference. So a message
that is lost, a line that was down and a peer that started again need no cases of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_r1.engine.part import Part
from megatron_r1.files import atomic_write

REPORT_SECONDS = 1.0
"""Both sides speak at least so often."""

ADDRESS_FILE = "controller.json"
"""In the run folder while a run takes engine hosts: {"engine_hosts": "tcp://host:port"}."""


class EngineReport(msgspec.Struct, frozen=True):
    """One engine of a host, or its part of one. url: reachable from other hosts, empty before its
    process started and for a part that does not serve; coordinator: where the other parts come to,
    of the first part only; end: how it ended and what its log says, with state "ended" only."""

    engine: str
    state: Literal["running", "stopping", "ended"]
    url: str = ""
    end: str = ""
    coordinator: str = ""


class Report(msgspec.Struct, frozen=True):
    """Host → controller: what there is. num_engines: how many it has room for, or parts of them;
    shared_memory: names its /dev/shm, the same only for hosts that share it; leaving: it will
    answer no more."""

    name: str
    num_engines: int
    shared_memory: str
    engines: list[EngineReport] = []
    leaving: bool = False


class EngineOrder(msgspec.Struct, frozen=True):
    """An engine that should run. settings: of `EngineSettings`, but for the host's own; part: what
    of it, where it is spread over several hosts."""

    engine: str
    model: str
    log: str
    settings: dict[str, Any] = {}
    part: Part | None = None


class Orders(msgspec.Struct, frozen=True):
    """Controller → host: the engines that should run there, all others should not; finished: the
    run is over, the host is no longer needed; silence_seconds: without a word from the controller
    for so long, the host stops its engines; refusal: why this host cannot serve this run."""

    silence_seconds: float
    engines: list[EngineOrder] = []
    finished: bool = False
    refusal: str = ""


def shared_memory_identity() -> str:
    """The kernel's name for this process's /dev/shm: the same in two processes that share it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{Path('/dev/shm').stat().st_dev}"


def publish_address(folder: Path, address: str) -> None:
    atomic_write(folder / ADDRESS_FILE, json.dumps({"engine_hosts": address}) + "\n")


def withdraw_address(folder: Path) -> None:
    (folder / ADDRESS_FILE).unlink(missing_ok=True)


def published_address(folder: Path) -> str | None:
    """Where engine hosts of this run connect to; None while it takes none."""
    try:
        return json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))["engine_hosts"]
    except FileNotFoundError:
        return None
