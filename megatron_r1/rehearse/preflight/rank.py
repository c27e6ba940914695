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
from megatron_r1.models.rendezvous_store import trainer_store
from megatron_r1.rehearse.preflight import links, node_probes
from megatron_r1.rehearse.preflight.facts import LinkRate, MemoryUsage, NodeFacts, RankFacts
from megatron_r1.rehearse.preflight.folder import measure_folder
from megatron_r1.rehearse.preflight.rank_placement import RankPlacement
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


def run(config: Config, settings: PreflightConfig) -> list[RankFacts]:
    """Run all checks; return the facts of all ranks on rank 0, elsewhere none.

    A rank that hangs ends the process, with its name (`rank_progress`)."""
    placement = RankPlacement.from_environment()
    progress = RankProgress(
        _connect_to_store,
        placement.rank,
        placement.host,
        placement.world_size,
        settings.timeout_seconds,
    )
    progress.start()
    progress.begin_step("versions and memory", START_TIMES)
    # Before this process and its neighbors hold any of it.
    device_memory = node_probes.device_memory(placement.local_rank)
    versions, memory = (
        (node_probes.node_versions(), node_probes.host_memory())
        if placement.is_node_leader
        else ({}, None)
    )
    progress.begin_step("join of the process groups", START_TIMES)
    groups = distributed.initialize(config.parallel, config.run.seed).groups
    progress.begin_step("matrix products")
    products = product_rate()
    axis_links: dict[str, LinkRate] = {}
    for axis, (_, operation) in links.AXIS_COLLECTIVES.items():
        progress.begin_step(f"{operation} over {axis}", START_TIMES)
        if link := links.measure_axis(groups, axis):
            axis_links[axis] = link
    progress.begin_step("links between nodes", START_TIMES)
    pairs = links.pair_rates(placement) if placement.num_nodes > 1 else []
    gloo = []
    if _uses_host_network(config) and placement.world_size > 1:
        progress.begin_step("links over gloo", START_TIMES)
        gloo = links.gloo_rates(placement, progress)
    progress.begin_step("run folder")
    folder = measure_folder(Path(config.run.folder), placement, progress)
    progress.begin_step("connections to rank 0, clocks, ports, sandbox")
    node = _node_facts(config, placement, progress, versions, memory)
    facts = RankFacts(
        rank=placement.rank,
        node_index=placement.node,
        host=placement.host,
        device=platform.device().type,
        memory=device_memory,
        product_flops=products,
        links=axis_links,
        pair_rates=pairs,
        folder=folder,
        node=node,
        seconds=progress.seconds,
        gloo_rates=gloo,
    )
    all_facts = _gather_facts(facts, placement, progress)
    distributed.leave_process_groups()
    progress.close()
    return all_facts


def _uses_host_network(config: Config) -> bool:
    """Return whether pushes, routed experts or experts that a balancer moves behind a push pass
    between hosts' memory by TCP."""
    moves_experts = config.rollout.redundant_experts > 0 and not config.rollout.colocated
    pushes = TRANSPORTS[config.push.transport].rate == "host_network"
    return pushes or config.rl.routing_replay or moves_experts


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
    duration = sorted(seconds)[len(seconds) // 2 if device.type == "cuda" else 0]
    return 2 * size**3 / duration


def _connect_to_store() -> dist.Store:
    """Return a connection to the ranks' store, which process groups use, too."""
    # `progress` ends what hangs.
    return dist.PrefixStore("preflight", trainer_store(timedelta(hours=1)))


def _node_facts(
    config: Config,
    placement: RankPlacement,
    progress: RankProgress,
    versions: dict[str, str],
    memory: MemoryUsage | None,
) -> NodeFacts | None:
    """Return what the first rank of a node finds; None on others.

    Args:
        config: the recipe.
        placement: the rank's place.
        progress: what the rank does now, for the others.
        versions: the versions of its packages.
        memory: the memory of its host; None: the rank leads no node."""
    node_facts, clock = None, None
    if placement.rank == 0:
        clock = node_probes.ClockServer(placement.num_nodes)
        progress.store.set("clock", str(clock.port))
    if memory is not None:
        port = int(progress.store.get("clock"))
        offset, unreachable = node_probes.clock_offset(os.environ["MASTER_ADDR"], port)
        ports = node_probes.unavailable_ports(config, placement)
        sandbox = node_probes.sandbox_problem()
        node_facts = NodeFacts(
            versions=versions,
            memory=memory,
            ports=ports,
            unreachable=unreachable,
            clock_offset=offset,
            lookup_seconds=node_probes.lookup_seconds(os.environ["MASTER_ADDR"]),
            sandbox=sandbox,
        )
    progress.barrier("clocks read")
    if clock is not None:
        clock.close()
    return node_facts


def _gather_facts(
    facts: RankFacts, placement: RankPlacement, progress: RankProgress
) -> list[RankFacts]:
    """Return the facts of all ranks on rank 0, elsewhere none."""
    progress.begin_step("results")
    progress.store.set(f"facts/{placement.rank}", msgspec.json.encode(facts).decode())
    all_facts = []
    if placement.rank == 0:
        for rank in range(placement.world_size):
            # Waits for the rank.
            content = progress.store.get(f"facts/{rank}")
            all_facts.append(msgspec.json.decode(content, type=RankFacts))
    progress.barrier(
        "results read"
    )  # until then rank 0 may need the store, and a rank's connection
    return all_facts
