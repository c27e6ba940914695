"""Places engines: on the controller's node, or with engine hosts that connect to it."""

import asyncio
import contextlib
import functools
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.authentication import make_token
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.controller_address import publish_address, withdraw_address
from megatron_r1.engines.fleet.engine import MakeServer
from megatron_r1.engines.fleet.fleet_state import Notify
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.fleet.remote_server import RemoteServer
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.server import EngineServer

RANK_GIB = 0.5
"""Memory of a rank of vLLM on a CPU, without weights and cache."""


def check_room(rollout: RolloutConfig) -> None:
    """Raise UserError for more engines than a host without GPUs has memory for; print a warning
    where they have more processes than it has cores."""
    if rollout.placement != "local" or gpu.engine_device() != "cpu":
        return
    ranks = (
        rollout.engines
        * rollout.tensor_parallel
        * rollout.pipeline_parallel
        * rollout.data_parallel
    )
    # Engines are started all at once: 100,000 of them took everything on a host down.
    needed_gib, host_gib = ranks * RANK_GIB, psutil.virtual_memory().total / 2**30
    if rollout.kv_cache_gib > host_gib:
        raise UserError(
            f"rollout.kv_cache_gib={rollout.kv_cache_gib}: each engine process takes so much, more "
            f"than the {host_gib:,.0f} GiB of this host; lower it",
            key="rollout.kv_cache_gib",
            cause=Cause.TOO_LARGE,
        )
    if needed_gib > host_gib:
        raise UserError(
            f"rollout.engines={rollout.engines}: {ranks:,} processes of vLLM take "
            f"{needed_gib:,.0f} GiB before they hold a model, and this host has {host_gib:,.0f}; "
            "lower it, or set rollout.placement: hosts",
            key="rollout.engines",
            cause=Cause.TOO_LARGE,
        )
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        print(
            f"rollout.engines: {rollout.engines} start {ranks} processes of vLLM on "
            f"{cores} cores, which they share with the trainer: they compute in turns, no faster "
            f"than {cores} would, and take the model {ranks} times and "
            f"{ranks * (RANK_GIB + rollout.kv_cache_gib):,.1f} GiB; set rollout.engines to "
            f"{max(1, cores // 2)}",
            file=sys.stderr,
        )


@contextlib.asynccontextmanager
async def open_host_pool(
    rollout: RolloutConfig, folder: Path, needs_shared_memory: bool, notify: Notify
) -> AsyncIterator[HostPool | None]:
    """Yield the pool of engine hosts of a run in `folder`, or None for `rollout.placement: local`.

    Hosts find the pool by the folder; at the end it orders them to leave.

    Args:
        rollout: the recipe's section.
        folder: the folder of the run.
        needs_shared_memory: whether weights travel through this host's /dev/shm, so that other
            hosts are refused.
        notify: called with a line when a host joins or leaves.

    Raises:
        UserError: if the port is taken, or this host's name does not resolve.
    """
    if rollout.placement == "local":
        yield None
        return
    address = hosts_address(rollout)
    pool = HostPool(
        f"tcp://*:{rollout.hosts_port or '*'}",
        make_token(folder),
        hosts_per_engine=rollout.hosts_per_engine,
        silence_seconds=rollout.host_silence_seconds,
        needs_shared_memory=needs_shared_memory,
        notify=_from_any_thread(notify),
    )
    try:
        url = f"tcp://{address}:{pool.port}"
        publish_address(folder, url)
        notify(
            f"engine hosts come to {url}: "
            f"python -m megatron_r1.engines.fleet.host --folder {folder}"
        )
        yield pool
    finally:
        withdraw_address(folder)
        await asyncio.to_thread(pool.close)


def hosts_address(rollout: RolloutConfig) -> str:
    """Return the address under which engine hosts reach the controller.

    Raises:
        UserError: the name does not resolve.
    """
    address = rollout.hosts_address or socket.gethostname()
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"rollout.hosts_address: {address} has no address ({error}); set one of this host's "
            "that engine hosts can reach",
            key="rollout.hosts_address",
            cause=Cause.NOT_FOUND,
        ) from error
    return address


def server_maker(pool: HostPool | None) -> MakeServer:
    """Return what makes the servers of engines on the pool's hosts, or on this host."""
    return EngineServer if pool is None else functools.partial(RemoteServer, pool)


def _from_any_thread(notify: Notify) -> Notify:
    """Return `notify` for the pool's thread, called in the event loop's."""
    loop = asyncio.get_running_loop()

    def notify_in_loop(message: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(notify, message)

    return notify_in_loop
