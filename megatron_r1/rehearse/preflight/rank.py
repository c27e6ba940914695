"""All checks on one rank, in the order of every rank."""

import os
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.platform import trainer_store
from megatron_r1.rehearse.preflight import host, links
from megatron_r1.rehearse.preflight.facts import Facts, LinkRate, Memory, NodeFacts, Place
from megatron_r1.rehearse.preflight.host import check_folder
from megatron_r1.rehearse.preflight.rank_progress import RankProgress
from megatron_r1.rehearse.settings import PreflightConfig
from megatron_r1.trainer import distributed

START_TIMES = 4.0
"""Times the limit for one check: Python's imports from a shared file system, and NCCL's groups."""


PRODUCT_SECONDS = {"cuda": 2.0, "cpu": 0.3}
"""A GPU that runs too hot lowers its clock within seconds."""
MIN_PRODUCTS = 3
"""The fewest products that are timed, where one takes longer than `PRODUCT_SECONDS`."""
PRODUCT_SIZES = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}


def run(config: Config, settings: PreflightConfig) -> list[Facts]:
    """Run all checks; return the facts of all ranks on rank 0, elsewhere none.

    A rank that hangs ends the process, with its name (`rank_progress`)."""
    place = Place.here()
    progress = RankProgress(
        _connect, place.rank, place.host, place.world_size, settings.timeout_seconds
    )
    progress.start()
    progress.enter("versions and memory", START_TIMES)
    # Before this process and its neighbors hold any of it.
    device_memory = host.device_memory(place.local_rank)
    versions, memory = (host.versions(), host.host_memory()) if place.leads else ({}, None)
    progress.enter("join of the process groups", START_TIMES)
    groups = distributed.initialize(config.parallel, config.run.seed).groups
    progress.enter("matrix products")
    products = product_rate()
    found: dict[str, LinkRate] = {}
    for axis, (_, operation) in links.AXES.items():
        progress.enter(f"{operation} over {axis}", START_TIMES)
        if link := links.axis_link(groups, axis):
            found[axis] = link
    progress.enter("links between nodes", START_TIMES)
    pairs = links.pair_rates(place) if place.num_nodes > 1 else []
    gloo = []
    if TRANSPORTS[config.push.transport].rate == "host_network" and place.world_size > 1:
        progress.enter("links over gloo", START_TIMES)
        gloo = links.gloo_rates(place, progress)
    progress.enter("run folder")
    folder = check_folder(Path(config.run.folder), place, progress)
    progress.enter("connections to rank 0, clocks, ports, sandbox")
    node = _node(config, place, progress, versions, memory)
    facts = Facts(
        rank=place.rank,
        node_index=place.node,
        host=place.host,
        device=platform.device().type,
        memory=device_memory,
        products=products,
        links=found,
        pairs=pairs,
        folder=folder,
        node=node,
        seconds=progress.seconds,
        gloo=gloo,
    )
    everyone = _gather(facts, place, progress)
    distributed.leave_process_groups()
    progress.close()
    return everyone


def product_rate() -> float:
    """Return the FLOP per second of square products: the median of a GPU's, whose clock is to
    hold; the best of a CPU's, which other processes share."""
    device = platform.device()
    size, dtype = PRODUCT_SIZES[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(left, right)  # not timed: libraries load
    seconds: list[float] = []
    end = time.perf_counter() + PRODUCT_SECONDS[device.type]
    while time.perf_counter() < end or len(seconds) < MIN_PRODUCTS:
        platform.synchronize()
        start = time.perf_counter()
        torch.matmul(left, right)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    chosen = sorted(seconds)[len(seconds) // 2 if device.type == "cuda" else 0]
    return 2 * size**3 / chosen


def _connect() -> dist.Store:
    """Return a connection to the ranks' store, which process groups use, too."""
    # `progress` ends what hangs.
    return dist.PrefixStore("preflight", trainer_store(timedelta(hours=1)))


def _node(
    config: Config,
    place: Place,
    progress: RankProgress,
    versions: dict[str, str],
    memory: Memory | None,
) -> NodeFacts | None:
    """Return what the first rank of a node finds; None on others."""
    found, clock = None, None
    if place.rank == 0:
        clock = host.ClockServer(place.num_nodes)
        progress.store.set("clock", str(clock.port))
    if memory is not None:
        port = int(progress.store.get("clock"))
        offset, unreachable = host.clock_offset(os.environ["MASTER_ADDR"], port)
        ports, sandbox = host.taken_ports(config, place), host.sandbox_fault()
        found = NodeFacts(
            versions=versions,
            memory=memory,
            ports=ports,
            unreachable=unreachable,
            clock_offset=offset,
            lookup_seconds=host.lookup_seconds(os.environ["MASTER_ADDR"]),
            sandbox=sandbox,
        )
    progress.meet("clocks read")
    if clock is not None:
        clock.close()
    return found


def _gather(facts: Facts, place: Place, progress: RankProgress) -> list[Facts]:
    """Return the facts of all ranks on rank 0, elsewhere none."""
    progress.enter("results")
    progress.store.set(f"facts/{place.rank}", msgspec.json.encode(facts).decode())
    everyone = []
    if place.rank == 0:
        for rank in range(place.world_size):
            # Waits for the rank.
            content = progress.store.get(f"facts/{rank}")
            everyone.append(msgspec.json.decode(content, type=Facts))
    progress.meet("results read")  # until then rank 0 may need the store, and a rank's connection
    return everyone
