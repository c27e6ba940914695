"""Bytes of one weight push, and what they take of the ranks that send and receive them.

They are summed over the push's own plan (`push/matching`); `push_traffic` has the links between
ranks."""

from functools import cache, lru_cache
from typing import Literal

from megatron_r1.base.transports import ACROSS_NODES, RELAY_BUCKET_BYTES, ROUNDS_AHEAD, TRANSPORTS
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.hf_config import key_value_heads
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.job_checks import check_engine_gpus
from megatron_r1.plan.push_traffic import (
    PushedWeights,
    SetTraffic,
    round_seconds,
    set_plans,
    traffic_of_sets,
)
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.matching.adapter_push import check_adapter_push, max_lora_rank
from megatron_r1.push.matching.planned_links import MAX_SET_ENGINES, engine_sets
from megatron_r1.push.matching.recipe_plan import (
    bytes_of_first_rank,
    check_drafter,
    engine_layout,
    shares_gpus_over_nccl,
)
from megatron_r1.push.matching.rounds import SCATTER_BUCKET_BYTES, planned_schedule
from megatron_r1.push.matching.tensors import CountBytes, fp8_bytes, plain_bytes
from megatron_r1.reporting.formatting import format_count

ADAPTERS_NOTE = "both factors of every adapter of its stage, whole (push.adapter_only)"


def planned_engine_layout(job: PlannedJob) -> EngineLayout:
    """Return the recipe's layout of an engine, or if it gives none, vLLM's usual one.

    A recipe gives none if rollout.tensor_parallel, .data_parallel and .pipeline_parallel are 1.
    Attention is then tensor-parallel as far as heads and node allow and data-parallel beyond, and
    routed experts are spread over all GPUs of an engine.
    """
    recipe_layout = engine_layout(job.config)
    if recipe_layout.ranks_per_engine > 1:
        return recipe_layout
    max_tensor = min(job.engine_gpus, job.hardware.gpus_per_node)
    tensor = max(size for size in range(1, max_tensor + 1) if _divides_attention(job, size))
    return EngineLayout(
        engines=job.config.rollout.engines,
        tensor_parallel=tensor,
        data_parallel=job.engine_gpus // tensor,
        expert_parallel=job.has_experts and job.engine_gpus > 1,
        redundant_experts=recipe_layout.redundant_experts,
    )


def _divides_attention(job: PlannedJob, tensor: int) -> bool:
    """Return whether `tensor` GPUs can share the attention, and divide the engine's GPUs."""
    heads, groups = job.hf_config["num_attention_heads"], key_value_heads(job.hf_config)
    is_even = groups % tensor == 0 or tensor % groups == 0
    return job.engine_gpus % tensor == 0 and heads % tensor == 0 and is_even


def check_engines_and_push(job: PlannedJob) -> None:
    """Raise UserError for engines that are impossible on these GPUs or for this model."""
    check_engine_gpus(job)
    if has_push(job):
        check_drafter(job.config)
        check_adapter_push(job.config, job.hf_config)


def has_push(job: PlannedJob) -> bool:
    """Return whether the job pushes weights to engines."""
    return job.trains and job.generates


def pushes_fp8(job: PlannedJob) -> bool:
    """Return whether engines receive and hold FP8 weights."""
    return has_push(job) and job.config.push.fp8


def drafts_with_mtp(job: PlannedJob) -> bool:
    """Return whether engines hold the MTP layers, to draft with."""
    return job.config.rollout.drafts_by_mtp


def pushed_lora(job: PlannedJob) -> LoraConfig | None:
    """Return the adapters, where these alone are pushed."""
    return job.config.model.lora if has_push(job) and job.config.push.adapter_only else None


def planned_rank_bytes(job: PlannedJob) -> int:
    """Return the bytes of weights on an engine's first GPU, which has the most. A pushed adapter is
    there three times: as it has come, as vLLM has loaded it, and in its LoRA layers."""
    all_weights = PushedWeights.from_config(job.hf_config, None, drafts=drafts_with_mtp(job))
    weights = _first_rank_bytes(all_weights, planned_engine_layout(job), _pushed_dtype(job))
    if (lora := pushed_lora(job)) is None:
        return weights
    return weights + round(pushed_rank_bytes(job) * (2 + max_lora_rank(lora.rank) / lora.rank))


def pushed_rank_bytes(job: PlannedJob) -> int:
    """Return the pushed bytes of an engine's first GPU, which has the most."""
    return _first_rank_bytes(_pushed_weights(job), planned_engine_layout(job), _pushed_dtype(job))


def _pushed_weights(job: PlannedJob) -> PushedWeights:
    return PushedWeights.from_config(job.hf_config, pushed_lora(job), drafts=drafts_with_mtp(job))


def _pushed_dtype(job: PlannedJob) -> str:
    """Return the form of pushed weights: a dtype, or "FP8"."""
    return "FP8" if pushes_fp8(job) else job.config.rollout.dtype


@cache  # the same function for the same form: it is a key of `traffic_of_sets`' results
def _byte_count(form: str) -> CountBytes:
    return fp8_bytes if form == "FP8" else plain_bytes(form)


@lru_cache(maxsize=1024)
def _first_rank_bytes(weights: PushedWeights, layout: EngineLayout, form: str) -> int:
    """Return the bytes that the first rank of an engine needs; arguments as of
    `_needs_of_ranks`."""
    return bytes_of_first_rank(weights.predicted_layout(layout), layout, _byte_count(form))


@lru_cache(maxsize=64)
def _needs_of_ranks(
    weights: PushedWeights, layout: EngineLayout, form: str
) -> list[tuple[int, int]]:
    """Return the bytes that each rank of an engine needs of a push, and of how many tensors.

    Args:
        weights: what is pushed.
        layout: the engines' layout.
        form: the dtype on the wire, or "FP8"."""
    count_bytes = _byte_count(form)
    num_bytes = [0] * layout.ranks_per_engine
    num_tensors = [0] * layout.ranks_per_engine
    for tensor, region, ranks in weights.predicted_layout(layout).regions_and_ranks():
        region_bytes = count_bytes(tensor.name, tensor.rule.dtype, region)
        for rank in ranks:
            num_bytes[rank] += region_bytes
            num_tensors[rank] += 1
    return [*zip(num_bytes, num_tensors, strict=True)]


def pushed_byte_count(job: PlannedJob) -> CountBytes:
    """Return what counts the bytes of weights as engines receive them."""
    return _byte_count(_pushed_dtype(job))


def _needed_bytes(job: PlannedJob) -> int:
    """Return the bytes for all engines, each element once per GPU that computes with it."""
    layout = planned_engine_layout(job)
    return layout.engines * sum(num_bytes for num_bytes, _ in _engine_needs(job, layout))


def _engine_needs(job: PlannedJob, layout: EngineLayout) -> list[tuple[int, int]]:
    """Return the bytes and the number of tensors that each rank of an engine needs of a push."""
    return _needs_of_ranks(_pushed_weights(job), layout, _pushed_dtype(job))


def receive_buffer_bytes(job: PlannedJob, memory: Literal["host", "GPU"] | None = None) -> int:
    """Return bytes of an engine rank's receive buffer.

    Args:
        job: the planned job.
        memory: the memory to count: 0 is returned if the transport's buffer is not there, or not
            between pushes. None counts it wherever it is.
    """
    is_elsewhere = memory is not None and (
        memory != _receive_buffer_place(job) or reuses_kv_cache(job)
    )
    if is_elsewhere or not has_push(job):
        return 0
    return pushed_rank_bytes(job)


def reuses_kv_cache(job: PlannedJob) -> bool:
    """Return whether the receive buffer is in the place of the KV cache, which sleeps meanwhile."""
    return shares_gpus_over_nccl(job.config)


def reused_kv_cache_bytes(job: PlannedJob) -> int:
    """Return the bytes of a push on a GPU next to the weights of trainer and engine: receive buffer
    and buckets of the rounds under way."""
    if not (has_push(job) and reuses_kv_cache(job)):
        return 0
    bucket = RELAY_BUCKET_BYTES if planned_engine_layout(job).engines > 1 else SCATTER_BUCKET_BYTES
    return receive_buffer_bytes(job) + 2 * ROUNDS_AHEAD * bucket


def _receive_buffer_place(job: PlannedJob) -> Literal["host", "GPU"]:
    """Return whose memory an engine rank receives in."""
    return TRANSPORTS[job.config.push.transport].memory


def push_link(job: PlannedJob) -> tuple[float, str]:
    """Return (bytes/s into an engine rank, name of the link)."""
    transport = TRANSPORTS[job.config.push.transport]
    if transport.is_single_node and not _is_one_node(job):
        transport = TRANSPORTS[ACROSS_NODES]
    rate: float = getattr(job.hardware, transport.rate)
    return rate * job.assumptions.push_efficiency, transport.link


def _is_one_node(job: PlannedJob) -> bool:
    return job.world_size + job.rollout_gpus <= job.hardware.gpus_per_node


def push_section(job: PlannedJob) -> QuantityTable:
    """Return the bytes that a push moves, their balance, and the memory that it keeps."""
    parallel, engines, form = job.parallel, planned_engine_layout(job), _pushed_dtype(job)
    grid = TrainerGrid.from_recipe(parallel, job.world_size)
    # What is for one host has to be set to gloo or nccl for more.
    max_engines = 1 if job.config.push.on_one_node and _is_one_node(job) else MAX_SET_ENGINES
    count = _byte_count(form)
    lora, drafts = pushed_lora(job), drafts_with_mtp(job)
    traffic = traffic_of_sets(
        job.hf_config,
        grid,
        engines,
        job.pipeline_stages,
        count,
        max_engines,
        drafts=drafts,
        lora=lora,
    )
    rank_bytes = traffic.received_bytes
    _, link_name = push_link(job)
    dtype_text = form
    if form == "FP8":
        dtype_text = (
            f"FP8, 1 B + 4 B / 128 x 128, what is no projection in {job.config.rollout.dtype}"
        )
    engine_bytes, trainer_bytes = max(rank_bytes), max(traffic.sent_bytes)
    total, gpus = sum(rank_bytes) * engines.engines, format_count(engines.num_ranks, "GPU")
    imbalance = engine_bytes * len(rank_bytes) / sum(rank_bytes)
    section = {
        "into an engine GPU": byte_quantity(
            engine_bytes,
            f"{'its part of every tensor' if lora is None else ADAPTERS_NOTE}, once, in "
            f"{dtype_text}, through its {link_name}",
        ),
        "into all engines": byte_quantity(total, f"{gpus}, each what it needs and no more"),
        "over what is needed": Quantity(
            total / _needed_bytes(job),
            "x",
            "bytes into all engines / those of the parts that their GPUs compute with; 1 is the "
            "least",
        ),
        "busiest engine GPU": Quantity(imbalance, "x", f"its bytes / the average of {gpus}"),
        "out of a trainer rank": byte_quantity(
            trainer_bytes,
            f"the busiest, {traffic.busiest_sender:.2f} x the average of {grid.world_size}; once "
            "per "
            f"set of {format_count(traffic.num_engines, 'engine')}, which pass it on",
        ),
    }
    if not _is_one_node(job):
        section |= _connection_section(job, engines, grid, traffic)
    if form != "FP8" and lora is None:
        section["in FP8"] = byte_quantity(
            _first_rank_bytes(_pushed_weights(job), engines, "FP8"),
            "into an engine GPU with projections quantized on the way, 1 B + 4 B / 128 x 128",
        )
    section["receive buffer"] = byte_quantity(
        receive_buffer_bytes(job), _receive_buffer_formula(job)
    )
    return section


def _connection_section(
    job: PlannedJob, engines: EngineLayout, grid: TrainerGrid, traffic: SetTraffic
) -> QuantityTable:
    """Return what connects the ranks, and how long that and a push take."""
    assumptions = job.assumptions
    num_slots = sum(num_tensors for _, num_tensors in _engine_needs(job, engines))
    rate, link = push_link(job)
    over_nccl = TRANSPORTS[job.config.push.transport].sends_in_rounds
    colocated = shares_gpus_over_nccl(job.config)
    set_ranks = 0 if colocated else traffic.num_engines * engines.ranks_per_engine
    communicator = grid.world_size + set_ranks if over_nccl else 0
    creation = ""
    route = f"a process group of two, and an engine rank has one of {traffic.num_engines}"
    if over_nccl:
        creation = f", and the creation of an NCCL communicator of {communicator:,} ranks"
        route = "sent in rounds through one communicator"
    section = {
        "links of a rank": Quantity(
            traffic.links_per_trainer_rank,
            "",
            "of the busiest trainer rank to engine ranks, of an engine rank "
            f"{traffic.links_per_engine_rank:,}; each "
            f"is {route}",
        ),
        "store requests": Quantity(
            traffic.requests(engines, grid.world_size, over_nccl=over_nccl),
            "",
            f"when all engines connect, to one TCPStore: {assumptions.store_requests:,.0f} per "
            "second",
        ),
        "set-up": Quantity(
            traffic.setup_seconds(engines, grid.world_size, num_slots, assumptions, communicator),
            "s",
            f"store requests, tables read and broadcast, the plan{creation}",
        ),
    }
    section["push"] = (
        _rounds_time(job, engines, grid)
        if over_nccl
        else Quantity(
            traffic.seconds(rate, assumptions),
            "s",
            f"out of the busiest trainer rank, then what engines pass on, through their {link}s, "
            "in rounds",
        )
    )
    return section


def _rounds_time(job: PlannedJob, engines: EngineLayout, grid: TrainerGrid) -> Quantity:
    """Return the seconds of a push in rounds through one communicator."""
    rate, link = push_link(job)
    layout = job.hf_config, grid, engines, job.pipeline_stages
    count, lora = pushed_byte_count(job), pushed_lora(job)
    plans = set_plans(*layout, count, MAX_SET_ENGINES, drafts=drafts_with_mtp(job), lora=lora)
    sets = engine_sets(engines.engines, MAX_SET_ENGINES)
    ranks = engines.ranks_per_engine
    colocated = shares_gpus_over_nccl(job.config)
    schedule = planned_schedule(plans, sets, ranks, grid.world_size, colocated=colocated)
    return Quantity(
        round_seconds(schedule, rate, job.assumptions),
        "s",
        f"{format_count(schedule.num_scatter_rounds, 'round')} in which weights enter engines, and "
        f"{schedule.num_relay_rounds:,} in which these pass them on: of a bucket each way "
        f"through every {link}",
    )


def _receive_buffer_formula(job: PlannedJob) -> str:
    push = job.config.push
    reuse_text = ", in the place of its KV cache" if reuses_kv_cache(job) else ""
    place = f"{_receive_buffer_place(job)}{reuse_text}"
    content = "all its weights" if pushed_lora(job) is None else ADAPTERS_NOTE
    text = f"of an engine rank, on its {place} ({push.transport}); {content}"
    if push.on_one_node and not _is_one_node(job):
        text += f"; {push.transport} is for one host, set push.transport to gloo or nccl"
    return text
