"""The engines of one host: makes what is match what was ordered."""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.server import EngineServer
from megatron_r1.fleet.hosts.wire import EngineOrder, EngineReport


@dataclass
class Local:
    """An engine that was ordered. server: None where it could not even be tried; `end` says why."""

    order: EngineOrder
    slot: int
    server: EngineServer | None = None
    end: str = ""
    stopping: threading.Thread | None = field(default=None, compare=False)

    def report(self) -> EngineReport:
        if self.stopping is not None:
            return EngineReport(self.order.engine, "stopping")
        if self.server is None or not self.server.is_alive():
            end = self.end or (self.server.describe_end() if self.server else "")
            return EngineReport(self.order.engine, "ended", end=end)
        url, coordinator = self.server.url, self.server.coordinator
        return EngineReport(self.order.engine, "running", url=url, coordinator=coordinator)


class HostEngines:
    """At most `num_engines`, or parts of engines, each in a slot with its share of the GPUs and a
    port of its own."""

    def __init__(
        self, num_engines: int, address: str, first_port: int | None, logs: Path | None
    ) -> None:
        """
        Args:
            address: of this host, where others reach the engines; they listen on it alone.
            first_port: of the engine in slot 0; None: any that is free.
            logs: folder for the engines' logs; None: where the controller says.
        """
        self.num_engines, self.address = num_engines, address
        self.first_port, self.logs = first_port, logs
        self._engines: dict[str, Local] = {}

    def follow(self, orders: list[EngineOrder]) -> None:
        """Start what is missing, stop what is too much. Call from the main thread: engines end with
        the thread that starts them."""
        wanted = {order.engine for order in orders}
        for name, engine in list(self._engines.items()):
            if name not in wanted:
                self._stop(engine)
            if engine.stopping is not None and not engine.stopping.is_alive():
                del self._engines[name]
        for order in orders:
            slots = set(range(self.num_engines)) - {e.slot for e in self._engines.values()}
            if order.engine not in self._engines and slots:
                self._engines[order.engine] = self._start(order, min(slots))

    def reports(self) -> list[EngineReport]:
        return [engine.report() for engine in self._engines.values()]

    def stop(self) -> None:
        """End all, at the same time, and wait for it."""
        for engine in self._engines.values():
            self._stop(engine)
        for engine in self._engines.values():
            if engine.stopping is not None:
                engine.stopping.join()
        self._engines = {}

    def _start(self, order: EngineOrder, slot: int) -> Local:
        log = self.logs / Path(order.log).name if self.logs else Path(order.log)
        settings = dict(order.settings)
        environment = dict(settings.pop("extra_env", None) or {})
        engine = Local(order, slot)
        try:
            if settings.get("device") == "cuda":
                environment |= gpus_of_slot(visible_gpus(os.environ), self.num_engines, slot)
            engine.server = EngineServer(
                order.model,
                log,
                **settings,
                host=self.address,
                port=None if self.first_port is None else self.first_port + slot,
                part=order.part,
                extra_env=environment,
            )
            engine.server.start()
        except (EngineError, OSError, TypeError) as error:
            engine.server, engine.end = None, str(error)
        return engine

    def _stop(self, engine: Local) -> None:
        """Begin to: an engine gets seconds to end by itself, while the host has to go on
        speaking."""
        if engine.stopping is None:
            stop = engine.server.stop if engine.server else lambda: None
            engine.stopping = threading.Thread(target=stop, daemon=True)
            engine.stopping.start()


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES, which Slurm sets; where nobody did, all there are."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def gpus_of_slot(visible: list[str], num_engines: int, slot: int) -> dict[str, str]:
    """The environment variable that gives an engine its equal share of a host's GPUs.

    Raises:
        EngineError: they cannot be shared out evenly.
    """
    if not visible or len(visible) % num_engines:
        raise EngineError(
            f"{len(visible)} GPUs ({','.join(visible) or 'none visible'}) cannot be divided among "
            f"{num_engines} engines; change --engines"
        )
    share = len(visible) // num_engines
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * share : (slot + 1) * share])}
