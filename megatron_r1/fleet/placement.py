"""Where engines run: on the controller's host, or on hosts that come to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from megatron_r1.config import RolloutConfig
from megatron_r1.engine import gpu
from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.server import EngineServer
from megatron_r1.fleet.engine import Engine, MakeServer
from megatron_r1.fleet.fleet import RolloutFleet
from megatron_r1.fleet.hosts.pool import HostPool
from megatron_r1.fleet.hosts.wire import publish_address, withdraw_address
from megatron_r1.processes.authentication import make_token

RANK_GIB = 0.5
"""Of a rank of vLLM on a CPU, without weights and cache."""
LOOK_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""After an engine that could not join: what is wrong with its host is rarely over at once."""


def check_room(rollout: RolloutConfig) -> None:
    """Refuse more engines than a host without GPUs has memory for, before all of them begin to fill
    it.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    if rollout.placement != "local" or gpu.device() != "cpu":
        return
    ranks = rollout.engines * rollout.tensor * rollout.pipeline * rollout.data
    needed = ranks * RANK_GIB
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > room:
        raise ValueError(
            f"rollout.engines={rollout.engines}: {ranks:,} processes of vLLM take "
            f"{needed:,.0f} GiB before they hold a model, and this host has {room:,.0f}; lower it, "
            "or set rollout.placement: hosts"
        )


@contextlib.asynccontextmanager
async def placed(
    rollout: RolloutConfig, folder: Path, needs_shared_memory: bool, say: Callable[[str], None]
) -> AsyncIterator[HostPool | None]:
    """The pool of engine hosts of a run in `folder`, if it takes any; told that the run is over at
    the end. Hosts find it by the folder.

    Raises:
        ValueError: the port is taken, or this host's name means nothing.
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
        say=_from_any_thread(say),
    )
    try:
        where = f"tcp://{address}:{pool.port}"
        publish_address(folder, where)
        say(f"engine hosts come to {where}: python -m megatron_r1.fleet.host --folder {folder}")
        yield pool
    finally:
        withdraw_address(folder)
        await asyncio.to_thread(pool.close)


def hosts_address(rollout: RolloutConfig) -> str:
    """Where engine hosts find the controller. Raises ValueError for a name that means nothing."""
    address = rollout.hosts_address or socket.gethostname()
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ValueError(
            f"rollout.hosts_address: {address} has no address ({error}); set one of this host's "
            "that engine hosts can reach"
        ) from error
    return address


def server_maker(pool: HostPool | None) -> MakeServer:
    return EngineServer if pool is None else pool.server


@contextlib.asynccontextmanager
async def growing(fleet: RolloutFleet, pool: HostPool | None) -> AsyncIterator[None]:
    """Meanwhile the fleet takes in every engine that a host brings room for."""
    task = asyncio.create_task(_take_in(fleet, pool)) if pool is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _take_in(fleet: RolloutFleet, pool: HostPool) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        joining = (fleet.add_engine() for _ in range(pool.num_free))
        outcomes = await asyncio.gather(*joining, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, EngineError):
                fleet.say(f"an engine could not join: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome
        if not all(isinstance(outcome, Engine) for outcome in outcomes):
            await asyncio.sleep(RETRY_SECONDS)


def _from_any_thread(say: Callable[[str], None]) -> Callable[[str], None]:
    """The pool has a thread of its own; what a person sees belongs to the controller's."""
    loop = asyncio.get_running_loop()

    def tell(message: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to tell
            loop.call_soon_threadsafe(say, message)

    return tell
