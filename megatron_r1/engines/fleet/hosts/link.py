"""A host's connection to the controller: one authenticated ZeroMQ socket that reconnects itself."""

import contextlib
import socket as sockets
import uuid
from urllib.parse import urlsplit

import msgspec
import zmq

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.authentication import protect_client
from megatron_r1.engines.fleet.hosts.wire import HostReport, Orders

REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class HostLink:
    """Connects at once and again by itself; a report that cannot be sent now is dropped."""

    def __init__(self, address: str, token: str) -> None:
        """address: tcp://host:port of the controller. Raises UserError for another form."""
        parts = urlsplit(address)
        if parts.scheme != "tcp" or not parts.hostname or not parts.port:
            raise UserError(
                f"controller address {address!r}: must be tcp://host:port",
                key="--controller",
                cause=Cause.MALFORMED,
            )
        self.address, self._peer = address, (parts.hostname, parts.port)
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().hex.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues for a connection that is down
        self._socket.setsockopt(zmq.LINGER, 1000)
        # A connection that went down silently is closed and tried again.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        protect_client(self._socket, token)
        self._monitor: zmq.Socket = self._socket.get_monitor_socket(REFUSED)
        self._socket.connect(address)
        self._decode = msgspec.msgpack.Decoder(Orders).decode

    def send(self, report: HostReport) -> None:
        """Send a report, or drop it while the connection is down: the next one repeats it."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(msgspec.msgpack.encode(report), zmq.NOBLOCK)

    def receive(self, timeout_seconds: float) -> Orders | None:
        """Return the newest orders that arrive in time, or None. Raises UserError where they cannot
        be read."""
        newest = None
        if self._socket.poll(int(timeout_seconds * 1000)):
            with contextlib.suppress(zmq.Again):
                while True:
                    newest = self._socket.recv(zmq.NOBLOCK)
        if newest is None:
            return None
        try:
            return self._decode(newest)
        except msgspec.MsgspecError as error:
            raise UserError(
                f"the orders of the run at {self.address} cannot be read ({error}): start hosts "
                "and run from the same commit",
                key="--controller",
                cause=Cause.CHANGED,
            ) from error

    def was_refused(self) -> bool:
        """Return whether the controller has rejected this token since the last call."""
        refused = False
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            refused = True
        return refused

    def local_address(self) -> str:
        """Return this host's address on the network that leads to the controller."""
        family = sockets.getaddrinfo(*self._peer, type=sockets.SOCK_DGRAM)[0]
        with sockets.socket(family[0], sockets.SOCK_DGRAM) as probe:
            probe.connect(family[4])  # UDP: chooses a route, sends nothing
            return probe.getsockname()[0]

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
