"""The engines, or parts of them, of one host: started and stopped as the controller orders."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.base.errors import UserError
from megatron_r1.engines.fleet.host_messages import EngineOrder, EngineReport
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.gpu import gpus_of_slot, visible_gpus
from megatron_r1.engines.server.server import EngineServer


@dataclass
class LocalEngine:
    """An engine that runs on this host by order of the controller.

    Attributes:
        order: what the controller asked for: name, model and settings.
        slot: its number on this host, below `num_engines`.
        server: the server; None where it could not be started.
        end: how the engine ended; the reason where it could not be started.
        stopping: the thread that stops it, if one does."""

    order: EngineOrder
    slot: int
    server: EngineServer | None = None
    end: str = ""
    stopping: threading.Thread | None = field(default=None, compare=False)

    def report(self) -> EngineReport:
        """Return the state that the controller hears of: running, stopping or ended with its
        reason."""
        if self.stopping is not None:
            return EngineReport(self.order.engine, "stopping")
        if self.server is None or not self.server.is_alive():
            end = self.end or (self.server.describe_end() if self.server else "")
            return EngineReport(self.order.engine, "ended", end_reason=end)
        url, coordinator = self.server.url, self.server.coordinator
        return EngineReport(self.order.engine, "running", url=url, coordinator=coordinator)

    def begin_stop(self) -> None:
        """Stop the engine in a thread: it has seconds to end by itself, in which the host must go
        on reporting."""
        if self.stopping is None:
            stop = self.server.stop if self.server else lambda: None
            self.stopping = threading.Thread(target=stop, daemon=True)
            self.stopping.start()


class LocalEngines:
    """At most `num_engines` engines, or parts of engines, on one host. Each has a slot, with a
    share of the GPUs and a port."""

    def __init__(
        self, num_engines: int, address: str, first_port: int | None, logs: Path | None
    ) -> None:
        """Prepare the slots of this host; no engine starts yet.

        Args:
            num_engines: the slots.
            address: the address of this host at which others reach the engines; they listen on no
                other.
            first_port: the port of the engine in slot 0; None for any free port.
            logs: the folder for the engines' logs; None for the controller's folder."""
        self.num_engines, self.address = num_engines, address
        self.first_port, self.logs = first_port, logs
        self._engines: dict[str, LocalEngine] = {}

    def apply_orders(self, orders: list[EngineOrder]) -> None:
        """Start ordered engines and stop others. Call from the main thread: engines end with the
        thread that starts them."""
        ordered_names = {order.engine for order in orders}
        for name, engine in list(self._engines.items()):
            if name not in ordered_names:
                engine.begin_stop()
            if engine.stopping is not None and not engine.stopping.is_alive():
                del self._engines[name]
        for order in orders:
            slots = set(range(self.num_engines)) - {e.slot for e in self._engines.values()}
            if order.engine not in self._engines and slots:
                self._engines[order.engine] = self._start_engine(order, min(slots))

    def reports(self) -> list[EngineReport]:
        """Return the state of every engine of this host."""
        return [engine.report() for engine in self._engines.values()]

    def stop(self) -> None:
        """Stop all engines at the same time, and wait until they have ended."""
        for engine in self._engines.values():
            engine.begin_stop()
        for engine in self._engines.values():
            if engine.stopping is not None:
                engine.stopping.join()
        self._engines = {}

    def _start_engine(self, order: EngineOrder, slot: int) -> LocalEngine:
        log = self.logs / Path(order.log).name if self.logs else Path(order.log)
        settings = dict(order.settings)
        environment = dict(settings.pop("extra_env", None) or {})
        engine = LocalEngine(order, slot)
        try:
            if settings.get("device") == "cuda":
                environment |= gpus_of_slot(
                    visible_gpus(os.environ), self.num_engines, slot, "--engines"
                )
            port = None if self.first_port is None else self.first_port + slot
            host_settings = {"host": self.address, "port": port, "part": order.part}
            engine.server = EngineServer(
                order.model, log, **settings, **host_settings, extra_env=environment
            )
            engine.server.start()
        except (EngineError, OSError, TypeError, UserError) as error:
            engine.server, engine.end = None, str(error)
        return engine
