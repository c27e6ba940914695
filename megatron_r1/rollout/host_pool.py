"""The controller's side of engine hosts: who is there, who runs what, who has vanished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from megatron_r1.authentication import protect_server
from megatron_r1.rollout.host_wire import (
    REPORT_SECONDS,
    Orders,
    Report,
    shared_memory_identity,
)
from megatron_r1.rollout.remote_server import RemoteServer

POLL_SECONDS = 0.05
FAREWELL_SECONDS = 10.0
"""Longer than an engine gets to end by itself."""
UNREACHABLE_SECONDS = 5.0
"""A host whose line is closed, not merely silent, has so long to come back."""


@dataclass
class Host:
    """heard, reached: when it spoke last, and when its line was last open; num_deaths: engines that
    ended here without being asked to."""

    report: Report
    heard: float
    reached: float
    servers: dict[str, RemoteServer] = field(default_factory=dict)
    num_deaths: int = 0

    @property
    def num_free(self) -> int:
        """Places neither given away nor still taken by an engine on its way out."""
        running = {engine.engine for engine in self.report.engines}
        return self.report.num_engines - len(running | self.servers.keys())


class HostPool:
    """Gives engines places on the hosts that report to it. Safe to use from any thread.

    A thread of its own speaks with the hosts, so that a controller deep in work is not taken for
    dead. Nothing here starts again what has died: the fleet decides that.
    """

    def __init__(
        self,
        bind: str,
        token: str,
        *,
        silence_seconds: float = 30.0,
        needs_shared_memory: bool = False,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """
        Args:
            bind: where hosts come to, as tcp://*:5557.
            silence_seconds: a host that has not been heard from for so long has vanished.
            needs_shared_memory: weights travel through this host's /dev/shm; refuse other hosts.
            say: told who comes and goes, from the pool's thread.

        Raises:
            ValueError: the port is taken.
        """
        self.silence_seconds, self.say = silence_seconds, say
        self._memory = shared_memory_identity() if needs_shared_memory else None
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tells a closed line from a silent one
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
        self._lock = threading.RLock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-hosts", daemon=True)
        self._thread.start()

    def server(self, model: Path, log_path: Path, **settings: Any) -> RemoteServer:
        """In the place of `EngineServer(...)`."""
        return RemoteServer(self, model, log_path, **settings)

    @property
    def num_free(self) -> int:
        """Engines that could be started now, besides those that already wait."""
        with self._lock:
            return sum(host.num_free for host in self._hosts.values()) - len(self._waiting)

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
            for host in self._hosts.values():
                host.servers.pop(server.order.engine, None)

    def still_has(self, server: RemoteServer) -> bool:
        """Whether a host still reports the engine, as far as is known."""
        with self._lock:
            return any(
                engine.engine == server.order.engine
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
                self._place_waiting()
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
        while self._socket.poll(int(POLL_SECONDS * 1000)):
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
            self.say(f"host {report.name} is here, with room for {report.num_engines} engines")
        host.report, host.heard, host.reached = report, now, now
        for engine in report.engines:
            server = host.servers.get(engine.engine)
            if server is not None:
                ended = engine.state == "ended" and server.is_alive()
                host.num_deaths += ended
                server.report = engine

    def _refuse(self, identity: bytes, report: Report) -> None:
        refusal = (
            f"host {report.name} does not share this host's memory, through which weights travel "
            "(/dev/shm): start it on this host, or set push.transport: gloo"
        )
        self._tell(identity, Orders(self.silence_seconds, refusal=refusal))
        if refusal != self.refusal:
            self.refusal = refusal
            self.say(refusal)

    def _place_waiting(self) -> None:
        """On the host where fewest engines died; of these the one with most room."""
        while self._waiting:
            free = [host for host in self._hosts.values() if host.num_free > 0]
            if not free:
                return
            host = min(free, key=lambda host: (host.num_deaths, -host.num_free))
            server = self._waiting.pop(0)
            host.servers[server.order.engine] = server
            server.host_name = host.report.name

    def _orders(self, host: Host) -> Orders:
        # The host gives up first, so that an engine never runs twice.
        ordered = [server.order for server in host.servers.values()]
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
        for server in host.servers.values():
            server.is_lost = True
        count = len(host.servers)
        self.say(f"host {host.report.name} {how}; {count} engine{'s' * (count != 1)} lost with it")
