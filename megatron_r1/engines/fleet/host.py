"""An engine host: the process that runs a controller's engines on a node, or parts of engines that
are spread over several nodes.

    python -m megatron_r1.engines.fleet.host --folder runs/mine             # a file system both see
    python -m megatron_r1.engines.fleet.host --controller tcp://node0:5557  # and MEGATRON_R1_TOKEN

It may join and leave while the run goes on. It ends with its parent, and its engines end with it.
It stops them by itself when the controller falls silent, because the controller then counts them
as lost. Exit status: 0 the run is over, 1 no controller for `--patience`
seconds, 2 a mistake of the user's, 143 SIGTERM or SIGINT.

One authenticated ZeroMQ socket, which reconnects itself, is its connection to the controller
(`HostLink`); its engines are started and stopped until they match the controller's orders
(`LocalEngines`)."""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import access
from megatron_r1.base.processes import children
from megatron_r1.base.processes.authentication import TOKEN_FILE, known_token, protect_client
from megatron_r1.engines.fleet.host_messages import (
    REPORT_SECONDS,
    EngineOrder,
    EngineReport,
    HostOrders,
    HostReport,
    published_address,
    shared_memory_identity,
)
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.gpu import gpus_of_slot, visible_gpus
from megatron_r1.engines.server.server import EngineServer

HANDSHAKE_FAILURE_EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class HostLink:
    """Connects at once and again by itself; a report that cannot be sent now is dropped."""

    def __init__(self, address: str, token: str) -> None:
        """Prepare to connect.

        Args:
            address: the controller's address, tcp://host:port.
            token: the token of the run.

        Raises:
            UserError: for an address of another form."""
        parts = urlsplit(address)
        if parts.scheme != "tcp" or not parts.hostname or not parts.port:
            raise UserError(
                f"controller address {address!r}: must be tcp://host:port",
                key="--controller",
                cause=Cause.MALFORMED,
            )
        self.address, self._peer = address, (parts.hostname, parts.port)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().hex.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues for a connection that is down
        self._socket.setsockopt(zmq.LINGER, 1000)
        # A connection that went down silently is closed and tried again.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        protect_client(self._socket, token)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(HANDSHAKE_FAILURE_EVENTS)
        self._socket.connect(address)
        self._decode = msgspec.msgpack.Decoder(HostOrders).decode

    def send(self, report: HostReport) -> None:
        """Send a report, or drop it while the connection is down: the next one repeats it."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(msgspec.msgpack.encode(report), zmq.NOBLOCK)

    def receive(self, timeout_seconds: float) -> HostOrders | None:
        """Return the newest orders that arrive in time, or None.

        Raises:
            UserError: the orders cannot be read.
        """
        newest_message = None
        if self._socket.poll(int(timeout_seconds * 1000)):
            with contextlib.suppress(zmq.Again):
                while True:
                    newest_message = self._socket.recv(zmq.NOBLOCK)
        if newest_message is None:
            return None
        try:
            return self._decode(newest_message)
        except msgspec.MsgspecError as error:
            raise UserError(
                f"the orders of the run at {self.address} cannot be read ({error}): start hosts "
                "and run from the same commit",
                key="--controller",
                cause=Cause.CHANGED,
            ) from error

    def was_refused(self) -> bool:
        """Return whether the controller has rejected this token since the last call."""
        is_refused = False
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            is_refused = True
        return is_refused

    def local_address(self) -> str:
        """Return this host's address on the network that leads to the controller."""
        family = socket.getaddrinfo(*self._peer, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
            probe.connect(family[4])  # UDP: chooses a route, sends nothing
            return probe.getsockname()[0]

    def close(self) -> None:
        """Close the connection to the controller."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()


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
        except (EngineError, OSError, TypeError) as error:
            engine.server, engine.end = None, str(error)
        return engine


POLL_SECONDS = 0.1
FIRST_ANSWER_SECONDS = 10.0
"""Time for a controller at a known address to answer, before the address is read again."""
EXIT_BY_SIGNAL, EXIT_WITHOUT_CONTROLLER = 128 + signal.SIGTERM, 1


class StopReason(Enum):
    """Why a host stopped following a controller."""

    FINISHED = "the run is over"
    SIGNALLED = "a signal"
    SILENT = "the controller fell silent"
    UNANSWERED = "the controller never answered"


class EngineHost:
    """A link to the controller, and the engines that the controller orders here."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = socket.gethostname()
        self.engines: LocalEngines | None = None
        self.is_signalled = False
        self._last_message: str | None = None

    def run(self) -> int:
        """Serve until the run is over or a signal arrives; return the exit status."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        waiting_since = time.monotonic()
        while time.monotonic() - waiting_since < self.options.patience:
            address = self.options.controller or published_address(self.options.folder)
            if address is None:
                self._print_new_message(f"waiting for a run in {self.options.folder}")
                time.sleep(REPORT_SECONDS)
            else:
                reason = self._serve_controller(address)
                if reason is StopReason.FINISHED:
                    return 0
                if reason is StopReason.SILENT:
                    waiting_since = time.monotonic()
            if self.is_signalled:
                return EXIT_BY_SIGNAL
        self._print_new_message(f"no controller for {self.options.patience:g} seconds: leaving")
        return EXIT_WITHOUT_CONTROLLER

    def _serve_controller(self, address: str) -> StopReason:
        """Follow the controller at `address` until it is gone, then stop all engines.

        Raises:
            UserError: the controller refuses this host.
        """
        options = self.options
        file = options.token_file or (options.folder and options.folder / TOKEN_FILE)
        link = HostLink(address, known_token(file))
        self._print_new_message(f"connecting to the controller at {address}")
        try:
            try:
                reason = self._follow_orders(link)
            finally:
                if self.engines is not None:
                    self.engines.stop()
            if reason in (StopReason.FINISHED, StopReason.SIGNALLED):
                link.send(self._host_report([], is_leaving=True))
            return reason
        finally:
            link.close()

    def _follow_orders(self, link: HostLink) -> StopReason:
        """Report what runs here and start or stop what is ordered, until the controller ends it or
        is silent for too long."""
        reason, patience = StopReason.UNANSWERED, FIRST_ANSWER_SECONDS
        heard_at, sent_at = time.monotonic(), 0.0
        sent_engines: list[EngineReport] | None = None
        while time.monotonic() - heard_at < patience:
            if self.is_signalled:
                return StopReason.SIGNALLED
            orders = link.receive(POLL_SECONDS)
            if orders is not None:
                self._print_new_message(f"in the run at {link.address}")
                heard_at, patience = time.monotonic(), orders.silence_seconds
                reason = StopReason.SILENT
                if orders.refusal:
                    raise UserError(orders.refusal, key="megatron-r1 host", cause=Cause.CONFLICT)
                if orders.is_finished:
                    self._print_new_message("the run is over")
                    return StopReason.FINISHED
                if self.engines is None:
                    # Only now the address by which the controller's host reaches this one is known.
                    options, address = self.options, self.options.address or link.local_address()
                    self.engines = LocalEngines(
                        options.engines, address, options.ports, options.logs
                    )
                self.engines.apply_orders(orders.engines)
            elif link.was_refused():
                self._print_new_message(f"{link.address} refuses this token: is it of another run?")
            engines = self.engines.reports() if self.engines else []
            if engines != sent_engines or time.monotonic() - sent_at > REPORT_SECONDS:
                link.send(self._host_report(engines))
                sent_engines, sent_at = engines, time.monotonic()
        if reason is StopReason.SILENT:
            self._print_new_message(f"no word from {link.address} for {patience:g} seconds")
        return reason

    def _host_report(self, engines: list[EngineReport], is_leaving: bool = False) -> HostReport:
        memory = shared_memory_identity()
        return HostReport(self.name, self.options.engines, memory, engines, is_leaving)

    def _on_signal(self, *_: object) -> None:
        self.is_signalled = True

    def _print_new_message(self, message: str) -> None:
        if message != self._last_message:
            print(f"{self.name}: {message}", flush=True)
            self._last_message = message


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of an engine host: where its controller is, and its GPUs."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_r1.engines.fleet.host",
        description="Run vLLM engines on this node for a run that is controlled elsewhere.",
    )
    location = parser.add_mutually_exclusive_group(required=True)
    location.add_argument("--folder", type=Path, help="the run's, on a file system shared with it")
    location.add_argument("--controller", help="tcp://host:port; the token is in MEGATRON_R1_TOKEN")
    parser.add_argument("--token-file", type=Path, help="with --controller, instead of that")
    parser.add_argument(
        "--engines", type=int, default=1, help="or parts of engines, that fit here and share GPUs"
    )
    parser.add_argument("--address", help="of this host; default: the one that faces the run's")
    parser.add_argument("--ports", type=int, help="first port of the engines; default: any")
    parser.add_argument("--logs", type=Path, help="folder; default: the run's logs/")
    parser.add_argument(
        "--patience", type=float, default=600.0, help="seconds to wait for a controller"
    )
    options = parser.parse_args(arguments)
    if options.engines < 1:
        parser.error(f"--engines is {options.engines}: a host needs room for at least 1")
    return options


def main() -> None:
    """Run an engine host until its controller or a signal ends it; exit with its status."""
    children.die_with_parent()
    try:
        options = parse_arguments()
        if options.folder is not None:
            access.allow_readers_as(options.folder)
        sys.exit(EngineHost(options).run())
    except UserError as error:
        print(f"megatron-r1 host: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
