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
(`local_engines`)."""

import argparse
import contextlib
import signal
import socket
import sys
import time
import uuid
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import access
from megatron_r1.base.processes import children
from megatron_r1.base.processes.authentication import TOKEN_FILE, known_token, protect_client
from megatron_r1.engines.fleet.controller_address import published_address
from megatron_r1.engines.fleet.host_messages import (
    REPORT_SECONDS,
    EngineReport,
    HostOrders,
    HostReport,
    shared_memory_identity,
)
from megatron_r1.engines.fleet.local_engines import LocalEngines

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
