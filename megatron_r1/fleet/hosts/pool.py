"""The controller's side of engine hosts: who is there, who runs what, who has vanished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from megatron_r1.fleet.hosts.places import Host, chosen
from megatron_r1.fleet.hosts.remote_server import RemoteServer
from megatron_r1.fleet.hosts.wire import (
    REPORT_SECONDS,
    Orders,
    Report,
    shared_memory_identity,
)
from megatron_r1.processes.authentication import protect_server

POLL_SECONDS = 0.05
FAREWELL_SECONDS = 10.0
"""Longer than an engine gets to end by itself."""
WAIT_SECONDS = 10.0
"""Engines without a host are no news for so long."""
UNREACHABLE_SECONDS = 5.0
"""A host whose line is closed, not merely silent, has so long to come back."""


class HostPool:
    """Gives engines places on the hosts that report to it, each all of its places at once: none
    waits for a second host while it keeps another from the first. Safe to use from any thread.

    A thread of its own speaks with the hosts, so that a controller deep in work is not taken for
    dead. Nothing here starts again what has died: the fleet decides that.
    """

    def __init__(
        self,
        bind: str,
        token: str,
        *,
        hosts_per_engine: int = 1,
        silence_seconds: float = 30.0,
        needs_shared_memory: bool = False,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """
        Args:
            bind: where hosts come to, as tcp://*:5557.
            hosts_per_engine: every engine is spread over so many.
            silence_seconds: a host that has not been heard from for so long has vanished.
            needs_shared_memory: weights travel through this host's /dev/shm; refuse other hosts.
            say: told who comes and goes, from the pool's thread.

        Raises:
            ValueError: the port is taken.
        """
        self.hosts_per_engine = hosts_per_engine
        self.silence_seconds, self.say = silence_seconds, say
        self._memory = shared_memory_identity() if needs_shared_memory else None
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tells a closed line from a silent one
        # A host that was cut off comes back while its old line still seems to be open.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, 1000)
        protect_server(self._socket, token)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(f"rollout.hosts_port: cannot listen at {bind}: {error}") from error
        address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(address.rpartition(":")[2])
        self.refusal: str | None = None
        """Why a host was turned away, if one was."""
        self._hosts: dict[bytes, Host] = {}
        self._waiting: list[RemoteServer] = []
        self._told_at = time.monotonic()
        self._told: int = 0
        self._placed: dict[str, RemoteServer] = {}
        self._lock = threading.RLock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-hosts", daemon=True)
        self._thread.start()

    def server(self, model: Path, log_path: Path, **settings: Any) -> RemoteServer:
        """In the place of `EngineServer(...)`."""
        return RemoteServer(self, model, log_path, self.hosts_per_engine, **settings)

    @property
    def num_free(self) -> int:
        """Engines that could be started now, besides those that already wait."""
        with self._lock:
            free, count = self._free(), 0
            while hosts := chosen(free, self.hosts_per_engine):
                free |= {host: free[host] - 1 for host in hosts}
                count += 1
            return count - len(self._waiting)

    def describe(self) -> str:
        with self._lock:
            hosts = [f"{h.report.name} with {h.report.num_engines}" for h in self._hosts.values()]
        return self.refusal or ", ".join(hosts) or "no host has come"

    def add(self, server: RemoteServer) -> None:
        with self._lock:
            self._waiting.append(server)

    def remove(self, server: RemoteServer) -> None:
        with self._lock:
            if server in self._waiting:
                self._waiting.remove(server)
            self._withdraw(server)

    def still_has(self, server: RemoteServer) -> bool:
        """Whether a host still reports the engine, as far as is known."""
        with self._lock:
            return any(
                engine.engine == server.name
                for host in self._hosts.values()
                for engine in host.report.engines
            )

    def close(self) -> None:
        """Tell the hosts that the run is over, and wait until they have left. Safe to call more
        than once."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        spoken, last = 0.0, {}
        while not self._closing:
            self._listen()
            with self._lock:
                self._judge_ended()
                self._place_waiting()
                self._tell_who_waits()
                orders = {identity: self._orders(host) for identity, host in self._hosts.items()}
                if orders != last or time.monotonic() - spoken > REPORT_SECONDS:
                    for identity, what in orders.items():
                        self._tell(identity, what)
                    last, spoken = orders, time.monotonic()
                self._give_up_the_silent()
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._hosts and time.monotonic() < deadline:
            with self._lock:
                for identity in list(self._hosts):
                    if not self._tell(identity, Orders(self.silence_seconds, finished=True)):
                        del self._hosts[identity]
            self._listen()
        self._socket.close()

    def _listen(self) -> None:
        """For so long and no longer: some host of many is always speaking."""
        deadline = time.monotonic() + POLL_SECONDS
        while (left := deadline - time.monotonic()) > 0 and self._socket.poll(int(left * 1000)):
            identity, payload = self._socket.recv_multipart()
            report = msgspec.msgpack.decode(payload, type=Report)
            with self._lock:
                self._hear(identity, report)

    def _hear(self, identity: bytes, report: Report) -> None:
        now, host = time.monotonic(), self._hosts.get(identity)
        if report.leaving:
            if self._closing:
                self._hosts.pop(identity, None)
            elif host is not None:
                self._lose(identity, "is leaving")
            return
        if self._memory and report.shared_memory != self._memory:
            self._refuse(identity, report)
            return
        if host is None:
            host = self._hosts[identity] = Host(report, now, now)
            what = "engines" if self.hosts_per_engine == 1 else "parts of engines"
            self.say(f"host {report.name} is here, room for {what}: {report.num_engines}")
        host.report, host.heard, host.reached = report, now, now
        for engine in report.engines:
            server = self._placed.get(engine.engine)
            if server is not None and engine.engine in host.given:
                part = next(part for part in server.parts if part.host is host)
                part.report = engine
                if engine.state == "ended" and part.ended is None:
                    part.ended = now

    def _refuse(self, identity: bytes, report: Report) -> None:
        refusal = (
            f"host {report.name} does not share this host's memory, through which weights travel "
            "(/dev/shm): start it on this host, or set push.transport: gloo"
        )
        self._tell(identity, Orders(self.silence_seconds, refusal=refusal))
        if refusal != self.refusal:
            self.refusal = refusal
            self.say(refusal)

    def _judge_ended(self) -> None:
        """An engine ends with the first part of it that does. But ranks also end when those on
        another host vanish, of which only that host's silence tells: before a part is blamed, the
        hosts of all others have to be heard from."""
        for server in list(self._placed.values()):
            ended = [part for part in server.parts if part.ended is not None]
            if not ended:
                continue
            first = min(ended, key=lambda part: part.ended)
            others = (part for part in server.parts if part is not first)
            if all(part.host.heard > first.ended for part in others):
                server.first_ended = first
                first.host.num_deaths += 1
                self._withdraw(server)

    def _place_waiting(self) -> None:
        """In the order in which they came, so that those who need many hosts get them."""
        while self._waiting:
            hosts = chosen(self._free(), len(self._waiting[0].parts))
            if not hosts:
                return
            server = self._waiting.pop(0)
            self._placed[server.name] = server
            for part, host in zip(server.parts, hosts, strict=True):
                part.host = host
                host.given.add(server.name)

    def _tell_who_waits(self) -> None:
        """Once for each number of them."""
        now, count = time.monotonic(), len(self._waiting)
        if count == self._told:
            self._told_at = now
        elif now - self._told_at > WAIT_SECONDS:
            self._told = count
            if count:
                each = self.hosts_per_engine
                self.say(
                    f"{count} engine{'s wait' if count > 1 else ' waits'} for {count * each} "
                    f"host{'s' * (count * each > 1)} to come ({self.describe()})"
                )

    def _withdraw(self, server: RemoteServer) -> None:
        """Have its hosts stop what they run of it."""
        self._placed.pop(server.name, None)
        for host in self._hosts.values():
            host.given.discard(server.name)

    def _free(self) -> dict[Host, int]:
        return {host: host.num_free for host in self._hosts.values()}

    def _orders(self, host: Host) -> Orders:
        servers = [self._placed[name] for name in sorted(host.given)]
        parts = [(s, part) for s in servers for part in s.parts if part.host is host]
        ordered = [order for s, part in parts if (order := s.order(part)) is not None]
        # The host gives up first, so that an engine never runs twice.
        return Orders(self.silence_seconds * 2 / 3, ordered)

    def _tell(self, identity: bytes, orders: Orders) -> bool:
        """Whether the line is open; if not, `_give_up_the_silent` sees to it."""
        try:
            self._socket.send_multipart([identity, msgspec.msgpack.encode(orders)], zmq.NOBLOCK)
            if identity in self._hosts:
                self._hosts[identity].reached = time.monotonic()
        except zmq.ZMQError:
            return False
        return True

    def _give_up_the_silent(self) -> None:
        now = time.monotonic()
        for identity, host in list(self._hosts.items()):
            if now - host.heard > self.silence_seconds:
                self._lose(identity, f"was not heard from for {self.silence_seconds:g} seconds")
            elif now - max(host.reached, host.heard) > UNREACHABLE_SECONDS:
                self._lose(identity, "has closed its line")

    def _lose(self, identity: bytes, how: str) -> None:
        host = self._hosts.pop(identity)
        servers = [self._placed[name] for name in host.given]
        for server in servers:
            server.loss = f"host {host.report.name} {how}"
            self._withdraw(server)
        count = len(servers)
        self.say(f"host {host.report.name} {how}; {count} engine{'s' * (count != 1)} lost with it")
