"""The connection of a node to that of rank 0: the ports, the clock and the names of hosts."""

import contextlib
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from megatron_r1.config import Config
from megatron_r1.rehearse.preflight.facts import RankPlacement

CLOCK_PROBES = 8
"""Round trips to rank 0's clock. The fastest counts: the error is at most half of its time."""
CONNECT_SECONDS = 10.0
LOOKUPS = 32
"""Names that are looked up at once, about as many as a process has links of a push."""


def unavailable_ports(config: Config, placement: RankPlacement) -> dict[str, str]:
    """Return why ports that the recipe fixes cannot be bound, by setting; on the controller's
    node, elsewhere {}."""
    settings = {
        "run.health_port": config.run.health_port,
        "rollout.hosts_port": config.rollout.hosts_port,
    }
    faults = {}
    for key, port in settings.items() if placement.node == 0 else ():
        if port:
            try:
                socket.create_server(("", port)).close()
            except OSError as error:
                faults[key] = f"port {port}: {os.strerror(error.errno or 0)}"
    return faults


class ClockServer:
    """Rank 0's clock at a free port, as the controller's own: other nodes connect to it, which also
    shows that they can. A thread answers each byte with the time."""

    def __init__(self, backlog: int) -> None:
        self._socket = socket.create_server(("", 0), backlog=backlog)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="clock", daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(CONNECT_SECONDS)
                    while connection.recv(1):
                        connection.sendall(struct.pack("!d", time.time()))

    def close(self) -> None:
        """Stop serving."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()


def clock_offset(address: str, port: int) -> tuple[float, str]:
    """Return how many seconds this clock is ahead of the one at `address`, by the fastest of a few
    round trips, and "" or why it cannot be reached."""
    probes = []
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            for _ in range(CLOCK_PROBES):
                sent = time.time()
                connection.sendall(b"?")
                (remote_time,) = struct.unpack("!d", connection.recv(8, socket.MSG_WAITALL))
                arrival = time.time()
                probes.append((arrival - sent, (sent + arrival) / 2 - remote_time))
    except (OSError, struct.error) as error:
        return 0.0, f"{address}:{port}: {error}"
    return min(probes)[1], ""


def lookup_seconds(address: str) -> float:
    """Return how long the slowest of `LOOKUPS` takes to find the host's name of an address.

    torch looks it up for every connection to a store, with an IPv4 address as it is written in
    IPv6, and waits for it (`c10d::detail::formatSockAddr`)."""
    addresses = socket.getaddrinfo(address, None, socket.AF_INET6, flags=socket.AI_V4MAPPED)
    mapped = str(addresses[0][4][0])

    def look_up(_: int) -> float:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            socket.getnameinfo((mapped, 0), 0)
        return time.monotonic() - start

    with ThreadPoolExecutor(LOOKUPS) as threads:
        return max(threads.map(look_up, range(LOOKUPS)))
