"""All checks on one rank, in the order of every rank."""

import os
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from megatron_r1 import models
from megatron_r1.base.errors import UserError
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config, infer_verb
from megatron_r1.models import platform
from megatron_r1.models.attention_choice import check_attention, longest_sample
from megatron_r1.models.loaded_libraries import loaded_libraries
from megatron_r1.models.rendezvous_store import trainer_store
from megatron_r1.plan.communicators import communicator_bytes, communicator_formula
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.rehearse.preflight import links, node_probes
from megatron_r1.rehearse.preflight.facts import (
    COMPILATIONS,
    Compilation,
    LinkRate,
    NodeFacts,
    RankFacts,
    TrainerFacts,
)
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
    node = None
    if placement.is_node_leader:
        node = NodeFacts(node_probes.node_versions(), node_probes.host_memory())
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
    progress.begin_step("attention", START_TIMES)
    if platform.has_gpu() and node is not None:
        node.trainer = _trainer_facts(config, placement.world_size)
    progress.barrier("attention asked")
    progress.begin_step(COMPILATIONS, START_TIMES)
    if node is not None and node.trainer is not None:
        node.compilations = _compile_kernels(config, placement, node.trainer)
    progress.barrier("compiled")
    progress.begin_step("run folder")
    folder = measure_folder(Path(config.run.folder), placement, progress)
    progress.begin_step("connections to rank 0, clocks, ports, sandbox")
    _reach_rank_0(config, placement, progress, node)
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
        libraries=loaded_libraries() if platform.has_gpu() else [],
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


def _compile_kernels(
    config: Config, placement: RankPlacement, trainer: TrainerFacts
) -> dict[str, Compilation]:
    """Compile with what this node's trainer ranks and engines will compile with."""
    from megatron_r1.rehearse.preflight import compilers

    is_local = config.rollout.placement == "local" and placement.node == 0
    samples = infer_verb(config) in ("rl", "sample")
    has_engines = samples and (config.rollout.colocated or is_local)
    return compilers.compile_kernels(
        with_cudnn=trainer.attention.startswith("fused"),
        with_nvcc=has_engines and compilers.engines_compile(in_fp8=config.push.fp8),
    )


def _trainer_facts(config: Config, world_size: int) -> TrainerFacts:
    """Return what a trainer rank of this node would start with."""
    try:
        hf_config = models.read_hf_config(config.model.path, config.model.head)
        model = models.transformer_config(hf_config, config)
        attention = check_attention(config, model, longest_sample(config, hf_config))
    except UserError as error:
        return TrainerFacts(fault=str(error))
    job = PlannedJob(hf_config, config, world_size, HARDWARE["H800"], verb=infer_verb(config))
    return TrainerFacts(str(attention), communicator_formula(job), communicator_bytes(job))


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


def _reach_rank_0(
    config: Config, placement: RankPlacement, progress: RankProgress, node: NodeFacts | None
) -> None:
    """Add to `node`, on the first rank of each node, what it finds on the way to rank 0's."""
    clock = None
    if placement.rank == 0:
        clock = node_probes.ClockServer(placement.num_nodes)
        progress.store.set("clock", str(clock.port))
    if node is not None:
        address, port = os.environ["MASTER_ADDR"], int(progress.store.get("clock"))
        node.clock_offset, node.unreachable = node_probes.clock_offset(address, port)
        node.ports = node_probes.unavailable_ports(config, placement)
        node.lookup_seconds = node_probes.lookup_seconds(address)
        node.sandbox = node_probes.sandbox_problem()
    progress.barrier("clocks read")
    if clock is not None:
        clock.close()


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
