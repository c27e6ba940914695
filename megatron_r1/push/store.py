"""Opens the store in which the trainer ranks and the engine ranks of a push meet."""

from __future__ import annotations

import os
import resource
import socket
from typing import Any

import torch.distributed as dist

from megatron_r1.config import RolloutConfig
from megatron_r1.models import platform
from megatron_r1.models.rendezvous_store import LOOPBACK, create_store, ranks_share_host


def open_store(rollout: RolloutConfig) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Return a client of rank 0's store of pushes, and the host and port at which ranks and engines
    of this host reach it.

    It listens where all of its clients come from: at the loopback interface, at MASTER_ADDR where
    ranks are on several hosts, at `rollout.hosts_address` where engines are, and everywhere where
    these two differ."""
    host, store = "", None
    if dist.get_rank() == 0:
        # Every pair and group has a connection of its own to the store while it is created, and
        # each is an open file of this process.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        host = LOOPBACK if ranks_share_host() else os.environ["MASTER_ADDR"]
        is_everywhere = False
        if rollout.placement == "hosts":
            engines = rollout.hosts_address or socket.gethostname()
            is_everywhere = not ranks_share_host() and _ip_address(host) != _ip_address(engines)
            host = host if is_everywhere else engines
        store = create_store(host, everywhere=is_everywhere)
    # Only rank 0 has chosen a port, and knows its host's own name.
    address = [host, store.port] if store is not None else None
    host, port = platform.broadcast_from_rank_zero(address)
    return store or dist.TCPStore(host, port, is_master=False), (host, port)


def _ip_address(name: str) -> Any:
    return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
