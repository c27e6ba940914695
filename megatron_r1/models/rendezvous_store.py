"""Stores of torch.distributed, in which ranks meet (`create_store`, `trainer_store`).

Rank 0 hosts them, at the one address at which others reach it. torch's own listen at every address
of the host, and have no authentication: anybody who reaches one can read and change what ranks tell
each other. A run on one host has its stores at the loopback interface."""

import errno
import os
import socket
from datetime import timedelta

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
BACKLOG = 4096
"""Connections that may wait to be accepted: all ranks connect at the same time."""
_hosted: set[tuple[str, int]] = set()


def ranks_share_host() -> bool:
    """Whether all trainer ranks are on this host, by torchrun's environment variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", size) == size


def trainer_store(timeout: timedelta | None = None) -> dist.TCPStore:
    """Return a connection to the store at which the ranks meet: torchrun's own, or one that rank 0
    hosts at MASTER_PORT.

    Args:
        timeout: how long a key is waited for; None for torch's default.

    Raises:
        OSError: where the port is taken.
        torch.distributed.DistError: where the store is not reached."""
    port, limit = int(os.environ["MASTER_PORT"]), timeout or dist.default_pg_timeout
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"]
    if not is_torchruns and ranks_share_host():
        address = LOOPBACK
    if is_torchruns or os.environ["RANK"] != "0" or (address, port) in _hosted:
        return dist.TCPStore(address, port, is_master=False, timeout=limit)
    return create_store(address, port, limit)


def create_store(
    address: str, port: int = 0, timeout: timedelta | None = None, *, everywhere: bool = False
) -> dist.TCPStore:
    """Return a store that this process hosts; its `port` is the one given, or any free one for 0.

    Args:
        address: a name or number of this host; the store listens there alone. Where the name leads
            to the loopback interface or to no interface of this host (a translated address), other
            hosts would not reach it, and it listens everywhere, as with `everywhere`.
        port: any free one for 0.
        timeout: how long a key is waited for; None: torch's.
        everywhere: listen at all addresses of this host.

    Raises:
        OSError: where the port is taken.
    """
    listener = _create_listener("" if everywhere else address, port)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=timeout or dist.default_pg_timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
    _hosted.add((address, port))
    return store


def _create_listener(address: str, port: int) -> socket.socket:
    if address:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        is_loopback = str(place[0]).startswith("127.") or place[0] == "::1"
        if not is_loopback or address in (LOOPBACK, "localhost", "::1"):
            try:
                return socket.create_server(place[:2], family=family, backlog=BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=BACKLOG)
