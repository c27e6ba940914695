"""An engine host: a process on each node of an engine pool that runs engines for a controller, or
parts of engines that are spread over several nodes.

    python -m megatron_r1.fleet.host --folder runs/mine                  # a file system both see
    python -m megatron_r1.fleet.host --controller tcp://node0:5557       # and MEGATRON_R1_TOKEN

It may come and go while the run goes on. It ends with its parent, its engines end with it, and it
stops them by itself where it no longer hears the controller: whatever that one does meanwhile, an
engine it has given up on serves nobody. Exit status: 0 the run is over, 1 no controller for
`--patience` seconds, 2 a mistake, 143 told to stop.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import time
from enum import Enum
from pathlib import Path

from megatron_r1.fleet.hosts.engines import HostEngines
from megatron_r1.fleet.hosts.link import HostLink
from megatron_r1.fleet.hosts.wire import (
    REPORT_SECONDS,
    EngineReport,
    Report,
    published_address,
    shared_memory_identity,
)
from megatron_r1.processes import children
from megatron_r1.processes.authentication import FILE, known_token

POLL_SECONDS = 0.1
FIRST_WORD_SECONDS = 10.0
"""How long a controller at a known address may take to answer, before the address is looked up
again."""
LEFT, GAVE_UP = 128 + signal.SIGTERM, 1


class End(Enum):
    """Why a host stopped following a controller."""

    FINISHED = "the run is over"
    TOLD = "told to leave"
    SILENT = "the controller fell silent"
    UNANSWERED = "it never spoke"


class Host:
    """One agent: a link to the controller, and the engines that one wants here."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = socket.gethostname()
        self.link: HostLink | None = None
        self.engines: HostEngines | None = None
        self.told_to_leave = False
        self._said: str | None = None

    def run(self) -> int:
        """Serve until the run is over, or told to leave; the exit status."""
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, self._leave)
        waiting_since = time.monotonic()
        try:
            while time.monotonic() - waiting_since < self.options.patience:
                if self._connect():
                    end = self._serve()
                    if end is End.FINISHED:
                        return 0
                    if end is End.SILENT:
                        waiting_since = time.monotonic()
                elif not self.told_to_leave:
                    time.sleep(REPORT_SECONDS)
                if self.told_to_leave:
                    return LEFT
            self._say(f"no controller for {self.options.patience:g} seconds: leaving")
            return GAVE_UP
        finally:
            if self.link is not None:
                self.link.close()

    def _connect(self) -> bool:
        """A fresh link to where the controller is now; False while it is nowhere."""
        options = self.options
        if self.link is not None:
            self.link.close()
            self.link = None
        address = options.controller or published_address(options.folder)
        if address is None:
            self._say(f"waiting for a run in {options.folder}")
            return False
        file = options.token_file or (options.folder and options.folder / FILE)
        self.link = HostLink(address, known_token(file))
        self._say(f"connecting to the controller at {address}")
        return True

    def _serve(self) -> End:
        """Follow the controller until there is none, then end all engines. Raises ValueError where
        it has no use for this host."""
        try:
            end = self._follow()
        finally:
            if self.engines is not None:
                self.engines.stop()
        if end in (End.FINISHED, End.TOLD):
            self.link.send(self._report([], leaving=True))
        return end

    def _follow(self) -> End:
        """Report what is, do what is ordered."""
        end, patience = End.UNANSWERED, FIRST_WORD_SECONDS
        heard, spoken, last = time.monotonic(), 0.0, None
        while time.monotonic() - heard < patience:
            if self.told_to_leave:
                return End.TOLD
            orders = self.link.receive(POLL_SECONDS)
            if orders is not None:
                self._say(f"in the run at {self.link.address}")
                heard, patience, end = time.monotonic(), orders.silence_seconds, End.SILENT
                if orders.refusal:
                    raise ValueError(orders.refusal)
                if orders.finished:
                    self._say("the run is over")
                    return End.FINISHED
                self._engines_here().follow(orders.engines)
            elif self.link.was_refused():
                self._say(f"{self.link.address} refuses this token: is it of another run?")
            engines = self.engines.reports() if self.engines else []
            if engines != last or time.monotonic() - spoken > REPORT_SECONDS:
                self.link.send(self._report(engines))
                last, spoken = engines, time.monotonic()
        if end is End.SILENT:
            self._say(f"no word from {self.link.address} for {patience:g} seconds")
        return end

    def _engines_here(self) -> HostEngines:
        """Made when first ordered: only then it is known by which address the controller's host
        reaches this one."""
        if self.engines is None:
            options = self.options
            address = options.address or self.link.local_address()
            self.engines = HostEngines(options.engines, address, options.ports, options.logs)
        return self.engines

    def _report(self, engines: list[EngineReport], leaving: bool = False) -> Report:
        memory = shared_memory_identity()
        return Report(self.name, self.options.engines, memory, engines, leaving)

    def _leave(self, *_: object) -> None:
        self.told_to_leave = True

    def _say(self, message: str) -> None:
        if message != self._said:
            print(f"{self.name}: {message}", flush=True)
            self._said = message


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_r1.fleet.host",
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
    children.die_with_parent()
    try:
        sys.exit(Host(parse()).run())
    except ValueError as error:
        print(f"megatron-r1 host: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
