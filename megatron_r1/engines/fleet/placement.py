"""Places engines: on the controller's node, or with engine hosts that connect to it.

`RemoteServer` is one engine on another host, or on several, with the interface of `EngineServer`.
"""

import asyncio
import contextlib
import functools
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.authentication import make_token
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.engine import Engine, MakeServer
from megatron_r1.engines.fleet.fleet_state import Notify
from megatron_r1.engines.fleet.host_messages import publish_address, withdraw_address
from megatron_r1.engines.fleet.host_pool import HostPool, RemoteEngine
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.client import is_healthy
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.server import EngineServer, Server

REMOTE_STOP_SECONDS = 15.0
"""An engine gets 5 seconds to end by itself; a host that reports nothing for longer counts as
gone."""


class RemoteServer(Server):
    """An engine that is started on any host that has room, now or later."""

    poll_seconds = 0.1

    def __init__(self, pool: HostPool, model: Path, log_path: Path, **settings: Any) -> None:
        """Prepare the engine; `start` orders it.

        Args:
            pool: the hosts.
            model: the model's folder.
            log_path: the engine's log.
            **settings: the settings, as for `RemoteEngine`."""
        self.pool = pool
        self.engine = RemoteEngine(model, log_path, pool.hosts_per_engine, settings)
        self._is_stopped = False

    @property
    def is_lost(self) -> bool:
        """Whether the engine, or the host it runs on, was lost."""
        return bool(self.engine.lost_because)

    @property
    def url(self) -> str:
        """The address, known once the host has started the server (after `wait_ready`).

        Raises:
            EngineError: no host has started the server.
        """
        if not self.engine.url:
            raise EngineError("the engine has not been started on any host yet")
        return self.engine.url

    def start(self) -> None:
        """Queue this engine for a host and return at once."""
        self.pool.add(self.engine)

    def is_alive(self) -> bool:
        """Return whether the engine runs or waits for hosts."""
        return not (self._is_stopped or self.engine.describe_end())

    def stop(self) -> None:
        """Stop the engine, and wait until its hosts report that; harmless if it has ended."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.pool.remove(self.engine)
        deadline = time.monotonic() + REMOTE_STOP_SECONDS
        while self.pool.still_has(self.engine) and time.monotonic() < deadline:
            time.sleep(self.poll_seconds)

    def describe_end(self) -> str:
        """Return how the engine ended, or that it did not."""
        state_text = "it was stopped" if self._is_stopped else "it is still running"
        return self.engine.describe_end() or state_text

    async def _is_ready(self) -> bool:
        if self.pool.refusal and not self.engine.host_names:
            raise EngineError(self.pool.refusal)
        return bool(self.engine.url) and await is_healthy(self.engine.url)

    def _why_not_ready(self) -> str:
        hosts, parts = self.engine.host_names, self.engine.parts
        if not hosts:
            host_phrase = "host" if len(parts) == 1 else f"{len(parts)} hosts"
            return f"no {host_phrase} had room for it ({self.pool.describe()})"
        for part in parts:
            if part.host is not None and (part.report is None or part.report.state != "running"):
                return f"host {part.host.name} has not started it"
        return (
            f"it runs on host {hosts}, but {self.url} does not answer this host: it still loads "
            f"(its log: {self.engine.log_path}), or a firewall is between them"
        )


RANK_GIB = 0.5
"""Memory of a rank of vLLM on a CPU, without weights and cache."""
POLL_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""The pause after an engine that could not join: the cause on its host is rarely over at once."""


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


@contextlib.asynccontextmanager
async def accepting_hosts(fleet: RolloutFleet, pool: HostPool | None) -> AsyncIterator[None]:
    """Add an engine to the fleet whenever a host has room for one, until the end of the block."""
    task = asyncio.create_task(_add_engines(fleet, pool)) if pool is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _add_engines(fleet: RolloutFleet, pool: HostPool) -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS)
        new_engines = (fleet.add_engine() for _ in range(pool.num_free))
        outcomes = await asyncio.gather(*new_engines, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, EngineError):
                fleet.state.notify(f"an engine could not join: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome
        if not all(isinstance(outcome, Engine) for outcome in outcomes):
            await asyncio.sleep(RETRY_SECONDS)


def _from_any_thread(notify: Notify) -> Notify:
    """Return `notify` for the pool's thread, called in the event loop's."""
    loop = asyncio.get_running_loop()

    def notify_in_loop(message: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(notify, message)

    return notify_in_loop
