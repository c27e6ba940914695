"""The controller's side of engine hosts, which join and leave: which are there, which runs what,
which are lost. The host's side is `engines.fleet.host`, their messages `host_messages`."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.authentication import protect_server
from megatron_r1.engines.fleet.host_messages import (
    REPORT_SECONDS,
    EngineOrder,
    EngineReport,
    HostOrders,
    HostReport,
    shared_memory_identity,
)
from megatron_r1.engines.server.settings import EnginePart


@dataclass(eq=False)
class HostRecord:
    """The controller's record of one engine host.

    Attributes:
        report: the host's last report.
        last_report_at: when its last report arrived (time.monotonic).
        last_reached_at: when the socket last accepted a message to it (time.monotonic).
        assigned: the parts of engines that it runs, by the engine's name.
        num_deaths: the number of engines that a part on this host has ended, without an order."""

    report: HostReport
    last_report_at: float
    last_reached_at: float
    assigned: dict[str, RemotePart] = field(default_factory=dict)
    num_deaths: int = 0

    @property
    def name(self) -> str:
        """The name that the host gave itself."""
        return self.report.name

    @property
    def num_free(self) -> int:
        """Slots neither assigned nor still taken by an engine that is stopping."""
        running_names = {engine.engine for engine in self.report.engines}
        return self.report.num_engines - len(running_names | self.assigned.keys())


@dataclass(eq=False)
class RemotePart:
    """The part of `engine` that one host runs: the whole engine, or an equal share.

    Attributes:
        engine: the engine that it is of.
        index: its number in the engine, from 0.
        host: None while the part waits for a host.
        report: the host's last report of the part.
        ended_at: when the host first reported that the part has ended (time.monotonic)."""

    engine: RemoteEngine
    index: int
    host: HostRecord | None = None
    report: EngineReport | None = None
    ended_at: float | None = None


class RemoteEngine:
    """An engine that should run on hosts of a pool. Once it has lost a host, or a part of it has
    ended, it never runs again, even if the host comes back.

    Attributes:
        lost_because: which host was lost, and how that was noticed; empty before.
        first_ended_part: the part whose end ended the engine."""

    def __init__(
        self, model: Path, log_path: Path, num_hosts: int, settings: dict[str, Any]
    ) -> None:
        """Describe an engine that has no hosts yet.

        Args:
            model: the model's folder.
            log_path: the engine's log.
            num_hosts: the number of hosts over which the engine is spread; it gets all at once.
            settings: fields of `EngineSettings`, except host, port, part and GPUs, which its hosts
                set."""
        self.name = uuid.uuid4().hex
        self.model, self.log_path = Path(model).resolve(), Path(log_path).resolve()
        self.settings = settings
        self.parts = [RemotePart(self, index) for index in range(num_hosts)]
        self.lost_because = ""
        self.first_ended_part: RemotePart | None = None

    @property
    def host_names(self) -> str:
        """Its hosts, the serving one first; empty while it waits for them."""
        return ", ".join(part.host.name for part in self.parts if part.host is not None)

    @property
    def url(self) -> str:
        """The address, `http://host:port`; empty until the host has started the part."""
        report = self.parts[0].report
        return report.url if report is not None else ""

    def order(self, part: RemotePart) -> EngineOrder | None:
        """Return the order for the host of a part. Return None while the coordinator's address is
        unknown: the first part reports it, and the other parts need it."""
        log = self.log_path  # parts may share a folder, so each has a file
        if part.index:
            log = log.with_stem(f"{log.stem}-part-{part.index}")
        first = self.parts[0].report
        settings = (self.name, str(self.model), str(log), self.settings)
        if len(self.parts) == 1:
            return EngineOrder(*settings)
        coordinator = first.coordinator if first is not None and part.index else ""
        if part.index and not coordinator:
            return None
        return EngineOrder(*settings, EnginePart(part.index, len(self.parts), coordinator))

    def describe_end(self) -> str:
        """Return how the engine ended, as its hosts report it; "" while it may run."""
        part = self.first_ended_part
        if self.lost_because or part is None:
            return self.lost_because
        assert part.host is not None and part.report is not None
        return f"on host {part.host.name}: {part.report.end_reason}"


def _choose_hosts(free: dict[HostRecord, int], count: int) -> list[HostRecord]:
    """Return the hosts for an engine, or [] if there are not enough.

    Hosts with the fewest deaths come first, and among equals those with the most free slots.

    Args:
        free: the free slots of each host.
        count: how many hosts the engine needs."""
    able_hosts = [host for host, slots in free.items() if slots > 0]
    able_hosts.sort(key=lambda host: (host.num_deaths, -free[host]))
    return able_hosts[:count] if len(able_hosts) >= count else []


POLL_SECONDS = 0.05
CLOSE_SECONDS = 10.0
"""Longer than an engine gets to end by itself."""
WAIT_SECONDS = 10.0
"""Time before engines that wait for a host are mentioned."""
UNREACHABLE_SECONDS = 5.0
"""Time for a host to come back whose connection is closed, not merely silent."""


class HostPool:
    """Assigns engines to the hosts that report to the pool. An engine on several hosts gets all of
    them at once: no engine holds one host, which another engine could use, while it waits for a
    second. Safe to use from any thread.

    A thread of its own exchanges messages with the hosts, so that a busy controller does not look
    dead. The pool restarts nothing that has died: the fleet decides that.

    Args:
        bind: the address at which hosts connect, such as tcp://*:5557.
        token: the run's secret, which hosts must know.
        hosts_per_engine: the number of hosts over which every engine is spread.
        silence_seconds: a host that sends no report for this time is lost.
        needs_shared_memory: refuse other hosts, because weights travel through this host's
            /dev/shm.
        notify: called in the pool's thread with a line when a host joins or leaves.

    Raises:
        UserError: if the port is taken.
    """

    def __init__(
        self,
        bind: str,
        token: str,
        *,
        hosts_per_engine: int = 1,
        silence_seconds: float = 30.0,
        needs_shared_memory: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.hosts_per_engine = hosts_per_engine
        self.silence_seconds, self.notify = silence_seconds, notify
        self._memory = shared_memory_identity() if needs_shared_memory else None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error if the connection is closed
        # A host that reconnects replaces its old connection, which may still look open. Without
        # this it is refused: a network down for 11 s cost a host's engines, although 30 s are
        # tolerated.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, 1000)
        protect_server(self._socket, token)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise UserError(
                f"rollout.hosts_port: cannot listen at {bind}: {error}",
                key="rollout.hosts_port",
                cause=Cause.BUSY,
            ) from error
        address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(address.rpartition(":")[2])
        self.refusal: str | None = None
        """The reason for which the last host was refused; None once one has been accepted."""
        self._notified_refusals: set[str] = set()
        self._hosts: dict[bytes, HostRecord] = {}
        self._waiting: list[RemoteEngine] = []
        self._placed: dict[str, RemoteEngine] = {}
        self._num_notified = 0
        self._notified_at = time.monotonic()
        self._lock = threading.RLock()
        self._closing = False
        self._thread = threading.Thread(target=self._serve_hosts, name="engine-hosts", daemon=True)
        self._thread.start()

    @property
    def num_free(self) -> int:
        """Engines that could be started now, besides those that already wait."""
        with self._lock:
            free_slots, count = self._free_slots(), 0
            while hosts := _choose_hosts(free_slots, self.hosts_per_engine):
                free_slots |= {host: free_slots[host] - 1 for host in hosts}
                count += 1
            return count - len(self._waiting)

    def describe(self) -> str:
        """Describe the connected hosts, or why there are none."""
        with self._lock:
            hosts = [f"{host.name} with {host.report.num_engines}" for host in self._hosts.values()]
        return self.refusal or ", ".join(hosts) or "no host has come"

    def add(self, engine: RemoteEngine) -> None:
        """Start an engine as soon as there is room for it."""
        with self._lock:
            self._waiting.append(engine)

    def remove(self, engine: RemoteEngine) -> None:
        """Order an engine's hosts to stop it; harmless if it has ended."""
        with self._lock:
            if engine in self._waiting:
                self._waiting.remove(engine)
            self._withdraw_engine(engine)

    def still_has(self, engine: RemoteEngine) -> bool:
        """Return whether a host still reports the engine."""
        with self._lock:
            return any(
                report.engine == engine.name
                for host in self._hosts.values()
                for report in host.report.engines
            )

    def close(self) -> None:
        """Order the hosts to leave, because the run is over, and wait until they have left. Safe to
        call more than once."""
        self._closing = True
        self._thread.join()

    def _serve_hosts(self) -> None:
        """Until closed: hear hosts, place engines that wait, send orders that changed; then
        dismiss the hosts."""
        sent_at, sent_orders = 0.0, dict[bytes, HostOrders]()
        while not self._closing:
            self._receive_reports()
            with self._lock:
                self._end_failed_engines()
                self._place_waiting()
                self._notify_waiting()
                orders = {
                    identity: self._orders_for_host(host) for identity, host in self._hosts.items()
                }
                if orders != sent_orders or time.monotonic() - sent_at > REPORT_SECONDS:
                    for identity, order in orders.items():
                        self._send_orders(identity, order)
                    sent_orders, sent_at = orders, time.monotonic()
                self._drop_silent()
        deadline = time.monotonic() + CLOSE_SECONDS
        # Repeated until the hosts have left: a socket closed right after its last send lost it.
        while self._hosts and time.monotonic() < deadline:
            with self._lock:
                for identity in list(self._hosts):
                    if not self._send_orders(
                        identity, HostOrders(self.silence_seconds, is_finished=True)
                    ):
                        del self._hosts[identity]
            self._receive_reports()
        self._socket.close()

    def _receive_reports(self) -> None:
        """Receive reports for POLL_SECONDS, and no longer: with many hosts another report is always
        waiting."""
        deadline = time.monotonic() + POLL_SECONDS
        while (seconds := deadline - time.monotonic()) > 0 and self._socket.poll(
            int(seconds * 1000)
        ):
            identity, *payload = self._socket.recv_multipart()
            try:
                report = msgspec.msgpack.decode(b"".join(payload), type=HostReport)
            except msgspec.MsgspecError as error:
                with self._lock:
                    self._refuse_host(
                        identity,
                        f"a host's report cannot be read ({error}): start hosts and run from the "
                        "same commit",
                    )
                continue
            with self._lock:
                self._update_host(identity, report)

    def _update_host(self, identity: bytes, report: HostReport) -> None:
        """Update a host's record from its report: a new host, news of its engines, or its
        farewell."""
        timestamp, host = time.monotonic(), self._hosts.get(identity)
        if report.is_leaving:
            if self._closing:
                self._hosts.pop(identity, None)
            elif host is not None:
                self._drop_host(identity, "is leaving")
            return
        if self._memory and report.shared_memory != self._memory:
            self._refuse_host(
                identity,
                f"host {report.name} does not share this host's memory, through which weights "
                "travel (/dev/shm): start it on this host, or set push.transport: gloo",
            )
            return
        if host is None:
            host = self._hosts[identity] = HostRecord(report, timestamp, timestamp)
            self.refusal = None
            unit = "engines" if self.hosts_per_engine == 1 else "parts of engines"
            self.notify(f"host {report.name} is here, room for {unit}: {report.num_engines}")
        host.report, host.last_report_at, host.last_reached_at = report, timestamp, timestamp
        for engine_report in report.engines:
            part = host.assigned.get(engine_report.engine)
            if part is not None:
                part.report = engine_report
                if engine_report.state == "ended" and part.ended_at is None:
                    part.ended_at = timestamp

    def _refuse_host(self, identity: bytes, refusal: str) -> None:
        """Send the reason to the host, which ends with it, and notify of each reason once."""
        self._send_orders(identity, HostOrders(self.silence_seconds, refusal=refusal))
        if not self._hosts:
            self.refusal = refusal
        if refusal not in self._notified_refusals:
            self._notified_refusals.add(refusal)
            self.notify(refusal)

    def _end_failed_engines(self) -> None:
        """End every engine of which a part has ended, and record the part that ended first as the
        cause. The ranks of a part also end when the ranks on another host are lost, and only the
        silence of that host shows it. So a part counts as the cause only when the hosts of all
        other parts have reported since."""
        for engine in list(self._placed.values()):
            ended_parts = [
                (part.ended_at, part.index) for part in engine.parts if part.ended_at is not None
            ]
            if not ended_parts:
                continue
            ended_at, index = min(ended_parts)
            first = engine.parts[index]
            hosts = (part.host for part in engine.parts if part is not first)
            if all(host is not None and host.last_report_at > ended_at for host in hosts):
                engine.first_ended_part = first
                if first.host is not None:
                    first.host.num_deaths += 1
                self._withdraw_engine(engine)

    def _place_waiting(self) -> None:
        """Place engines in the order of their arrival, so that those on many hosts get them."""
        while self._waiting:
            hosts = _choose_hosts(self._free_slots(), len(self._waiting[0].parts))
            if not hosts:
                return
            engine = self._waiting.pop(0)
            self._placed[engine.name] = engine
            for part, host in zip(engine.parts, hosts, strict=True):
                part.host = host
                host.assigned[engine.name] = part

    def _notify_waiting(self) -> None:
        """Notify once for each number of waiting engines, when it has lasted WAIT_SECONDS."""
        timestamp, count = time.monotonic(), len(self._waiting)
        if count == self._num_notified:
            self._notified_at = timestamp
        elif timestamp - self._notified_at > WAIT_SECONDS:
            self._num_notified = count
            if count:
                num_hosts = count * self.hosts_per_engine
                self.notify(
                    f"{count} engine{'s wait' if count > 1 else ' waits'} for {num_hosts} "
                    f"host{'s' * (num_hosts > 1)} to come ({self.describe()})"
                )

    def _withdraw_engine(self, engine: RemoteEngine) -> None:
        """Order every host of `engine` to stop its part."""
        self._placed.pop(engine.name, None)
        for host in self._hosts.values():
            host.assigned.pop(engine.name, None)

    def _free_slots(self) -> dict[HostRecord, int]:
        return {host: host.num_free for host in self._hosts.values()}

    def _orders_for_host(self, host: HostRecord) -> HostOrders:
        orders = [part.engine.order(part) for _, part in sorted(host.assigned.items())]
        # The host gives up first, so that an engine never runs twice.
        return HostOrders(self.silence_seconds * 2 / 3, [order for order in orders if order])

    def _send_orders(self, identity: bytes, orders: HostOrders) -> bool:
        """Return whether the connection is open; if not, `_drop_silent` acts on it."""
        try:
            self._socket.send_multipart([identity, msgspec.msgpack.encode(orders)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        if identity in self._hosts:
            self._hosts[identity].last_reached_at = time.monotonic()
        return True

    def _drop_silent(self) -> None:
        timestamp = time.monotonic()
        for identity, host in list(self._hosts.items()):
            if timestamp - host.last_report_at > self.silence_seconds:
                self._drop_host(
                    identity, f"was not heard from for {self.silence_seconds:g} seconds"
                )
            elif timestamp - max(host.last_reached_at, host.last_report_at) > UNREACHABLE_SECONDS:
                self._drop_host(identity, "closed its connection")

    def _drop_host(self, identity: bytes, how: str) -> None:
        host = self._hosts.pop(identity)
        engines = [part.engine for part in host.assigned.values()]
        for engine in engines:
            engine.lost_because = f"host {host.name} {how}"
            self._withdraw_engine(engine)
        count = len(engines)
        self.notify(f"host {host.name} {how}; {count} engine{'s' * (count != 1)} lost with it")
