"""An engine host: a process on each node of an engine pool that runs engines for a controller, or
parts of engines that are spread over several nodes.

    python -m megatron_r1.engines.fleet.host --folder runs/mine             # a file system both see
    python -m megatron_r1.engines.fleet.host --controller tcp://node0:5557  # and MEGATRON_R1_TOKEN

It may join and leave while the run goes on. It ends with its parent, and its engines end with it.
It stops them by itself when the controller falls silent, so that an engine which the controller has
given up on serves no more. Exit status: 0 the run is over, 1 no controller for `--patience`
seconds, 2 a mistake of the user's, 143 SIGTERM or SIGINT."""

import argparse
import signal
import socket
import sys
import time
from enum import Enum
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import access
from megatron_r1.base.processes import lifetime
from megatron_r1.base.processes.authentication import FILE, known_token
from megatron_r1.engines.fleet.hosts.link import HostLink
from megatron_r1.engines.fleet.hosts.local_engines import LocalEngines
from megatron_r1.engines.fleet.hosts.wire import (
    REPORT_SECONDS,
    EngineReport,
    HostReport,
    published_address,
    shared_memory_identity,
)

POLL_SECONDS = 0.1
FIRST_ANSWER_SECONDS = 10.0
"""Time for a controller at a known address to answer, before the address is read again."""
LEFT, GAVE_UP = 128 + signal.SIGTERM, 1


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
                self._print(f"waiting for a run in {self.options.folder}")
                time.sleep(REPORT_SECONDS)
            else:
                reason = self._serve(address)
                if reason is StopReason.FINISHED:
                    return 0
                if reason is StopReason.SILENT:
                    waiting_since = time.monotonic()
            if self.is_signalled:
                return LEFT
        self._print(f"no controller for {self.options.patience:g} seconds: leaving")
        return GAVE_UP

    def _serve(self, address: str) -> StopReason:
        """Follow the controller at `address` until it is gone, then stop all engines. Raises
        UserError if it refuses this host."""
        options = self.options
        file = options.token_file or (options.folder and options.folder / FILE)
        link = HostLink(address, known_token(file))
        self._print(f"connecting to the controller at {address}")
        try:
            try:
                reason = self._follow(link)
            finally:
                if self.engines is not None:
                    self.engines.stop()
            if reason in (StopReason.FINISHED, StopReason.SIGNALLED):
                link.send(self._report([], leaving=True))
            return reason
        finally:
            link.close()

    def _follow(self, link: HostLink) -> StopReason:
        """Report what runs here and start or stop what is ordered, until the controller ends it or
        is silent for too long."""
        reason, patience = StopReason.UNANSWERED, FIRST_ANSWER_SECONDS
        heard_at, sent_at = time.monotonic(), 0.0
        sent: list[EngineReport] | None = None
        while time.monotonic() - heard_at < patience:
            if self.is_signalled:
                return StopReason.SIGNALLED
            orders = link.receive(POLL_SECONDS)
            if orders is not None:
                self._print(f"in the run at {link.address}")
                heard_at, patience = time.monotonic(), orders.silence_seconds
                reason = StopReason.SILENT
                if orders.refusal:
                    raise UserError(orders.refusal, key="megatron-r1 host", cause=Cause.CONFLICT)
                if orders.finished:
                    self._print("the run is over")
                    return StopReason.FINISHED
                if self.engines is None:
                    # Only now the address by which the controller's host reaches this one is known.
                    options, here = self.options, self.options.address or link.local_address()
                    self.engines = LocalEngines(options.engines, here, options.ports, options.logs)
                self.engines.follow(orders.engines)
            elif link.was_refused():
                self._print(f"{link.address} refuses this token: is it of another run?")
            engines = self.engines.reports() if self.engines else []
            if engines != sent or time.monotonic() - sent_at > REPORT_SECONDS:
                link.send(self._report(engines))
                sent, sent_at = engines, time.monotonic()
        if reason is StopReason.SILENT:
            self._print(f"no word from {link.address} for {patience:g} seconds")
        return reason

    def _report(self, engines: list[EngineReport], leaving: bool = False) -> HostReport:
        memory = shared_memory_identity()
        return HostReport(self.name, self.options.engines, memory, engines, leaving)

    def _on_signal(self, *_: object) -> None:
        self.is_signalled = True

    def _print(self, message: str) -> None:
        if message != self._last_message:
            print(f"{self.name}: {message}", flush=True)
            self._last_message = message


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of an engine host: where its controller is, and its GPUs."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_r1.engines.fleet.host",
        description="Run vLLM engines on this node for a run that is controlled elsewhere.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--folder", type=Path, help="the run's, on a file system shared with it")
    where.add_argument("--controller", help="tcp://host:port; the token is in MEGATRON_R1_TOKEN")
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
    lifetime.die_with_parent()
    try:
        options = parse()
        if options.folder is not None:
            access.allow_as(options.folder)
        sys.exit(EngineHost(options).run())
    except UserError as error:
        print(f"megatron-r1 host: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
