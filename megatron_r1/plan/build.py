"""Builds the real ranks of a layout on torch's meta device, and compares the plan with them.

torch's "fake" process group replaces the cluster: Megatron lays out its groups and builds the model
as it would there, without memory for weights. Ranks of one pipeline stage have the same parameters
by name and shape; one rank of each stage is built, and every rank of the job is then compared with
the weight table's entry for its coordinates."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.weights.layout import LayoutEntry, Shard, parameter_layout
from megatron_r1.models.weights.splits import Shape
from megatron_r1.plan.counts import ModelCounts, RankCounts
from megatron_r1.plan.job import PlannedJob


def build_ranks(job: PlannedJob, pipeline_ranks: Iterable[int] | None = None) -> str:
    """Build and compare the ranks of `pipeline_ranks` (default: all); return a summary sentence.

    Raises:
        ValueError: a parameter differs (the message names the first), or all ranks together do not
            own every value of the model exactly once.
    """
    platform.prepare_process()
    from megatron_r1.models import patches

    patches.install()
    start = time.perf_counter()
    ranks_to_build = list(pipeline_ranks or range(job.parallel.pipeline))
    counts = RankCounts(job)
    shapes_by_rank = {}
    for rank in ranks_to_build:
        shapes_by_rank[rank] = _build_stage(job, rank)
        num_values = sum(
            prod(shape) for shapes in shapes_by_rank[rank] for shape in shapes.values()
        )
        num_planned = counts.rank_counts(rank).parameters + counts.rank_counts(rank).buffers
        if num_values != num_planned:
            raise ValueError(
                f"pipeline rank {rank} has {num_values:,} values, the plan says {num_planned:,}"
            )
    seconds = time.perf_counter() - start
    num_ranks, num_distinct, num_owned = _compare_ranks(job, shapes_by_rank)
    model_counts = ModelCounts(job.hf_config)
    num_expected = model_counts.num_total + (model_counts.mtp_own if job.with_mtp else 0)
    if len(ranks_to_build) == job.parallel.pipeline and num_owned != num_expected:
        raise ValueError(
            f"all ranks together own {num_owned:,} values, the model has {num_expected:,}"
        )
    total = time.perf_counter() - start
    return (
        f"built {len(ranks_to_build)} pipeline ranks on the meta device in {seconds:.0f} s; "
        f"{num_ranks:,} ranks ({num_distinct} different) equal the weight table by name and shape, "
        f"together they own {num_owned:,} values; {total:.0f} s in all"
    )


def _build_stage(job: PlannedJob, pipeline_rank: int) -> list[dict[str, tuple[int, ...]]]:
    """Build the stage's first rank; return every chunk's shapes by name, checked against the weight
    table as in a run."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_r1 import models
    from megatron_r1.models.weights.loading import local_entries, model_tensors
    from megatron_r1.trainer import distributed

    parallel = job.parallel
    rank = pipeline_rank * (job.world_size // parallel.pipeline)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=job.num_model_chunks
            if job.num_model_chunks > 1
            else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        transformer = models.transformer_config(job.hf_config, _without_kernels(job.config))
        transformer.perform_initialization = False
        with _on_meta_device():
            chunks = [
                models.build_model(job.hf_config, transformer, vp_stage=stage)
                for stage in (range(job.num_model_chunks) if job.num_model_chunks > 1 else [None])
            ]
        for _ in local_entries(chunks, job.hf_config):
            pass
        return [{n: tuple(t.shape) for n, t in model_tensors(chunk).items()} for chunk in chunks]
    finally:
        distributed.leave_process_groups()


def _without_kernels(config: Config) -> Config:
    """Return the recipe without choices of kernels that only a GPU has; shapes do not depend on
    them."""
    model = {"attention_backend": "auto", "fusions": None}
    return config.with_changes(model=model, parallel={"dispatcher": "alltoall"})


@contextlib.contextmanager
def _on_meta_device() -> Iterator[None]:
    """Create tensors without an explicit device on the meta device, inside this context.

    torch.device("meta") would miss the constructors that platform.prepare_process() has wrapped."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._device import _device_constructors

    constructors = {getattr(make, "__wrapped__", make) for make in _device_constructors()}

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if function in constructors and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    with OnMeta():
        yield


def _compare_ranks(
    job: PlannedJob, shapes_by_rank: dict[int, list[dict[str, Shape]]]
) -> tuple[int, int, int]:
    """Return (ranks compared, distinct ranks, values that they own together)."""
    parallel = job.parallel
    entries: dict[tuple[int, ...], tuple[int, int]] = {}
    num_ranks = num_owned = 0
    sizes = (parallel.tensor, parallel.expert, parallel.expert_tensor)
    for *key, dense_replica, expert_replica in _rank_coordinates(job):
        pipeline, *shard_ranks = key
        if pipeline not in shapes_by_rank:
            continue
        num_ranks += 1
        if (coordinate := tuple(key)) not in entries:
            place = dict(
                zip(("tp", "ep", "etp"), zip(shard_ranks, sizes, strict=True), strict=True)
            )
            entries[coordinate] = _count_owned_values(
                job, pipeline, shapes_by_rank[pipeline], place
            )
        dense, expert = entries[coordinate]
        num_owned += dense * (dense_replica == 0) + expert * (expert_replica == 0)
    return num_ranks, len(entries), num_owned


def _count_owned_values(
    job: PlannedJob,
    pipeline_rank: int,
    chunk_shapes: list[dict[str, Shape]],
    place: dict[str, Any],
) -> tuple[int, int]:
    """Return how many dense and how many expert values a rank owns, as (dense, expert).

    Args:
        job: the planned job.
        pipeline_rank: the pipeline rank that was built.
        chunk_shapes: the shapes of each of its chunks, by name.
        place: the rank's place on the other axes, with their sizes.

    Raises:
        ValueError: `chunk_shapes` differ from the plan."""
    num_owned: defaultdict[bool, int] = defaultdict(int)
    for chunk, shapes in zip(job.pipeline_stages[pipeline_rank], chunk_shapes, strict=True):
        # Without a GPU the layers, and so the names, are Megatron's own.
        shard: Shard = replace(
            chunk, **place, transformer_engine=platform.uses_transformer_engine()
        )
        entries = parameter_layout(job.hf_config, shard)
        if differences := {n: e.shape for n, e in entries.items()}.items() ^ shapes.items():
            raise ValueError(f"pipeline rank {pipeline_rank}: {sorted(differences)[:4]} differ")
        for entry in entries.values():
            if entry.is_owner:
                num_owned[entry.is_expert] += _num_values(entry)
    return num_owned[False], num_owned[True]


def _num_values(entry: LayoutEntry) -> int:
    """Return the number of Hugging Face values in an entry, without padding."""
    row_sizes = [prod(entry.shape) // entry.shape[piece.dim] for piece in entry.pieces]
    return sum(n * piece.length for n, piece in zip(row_sizes, entry.pieces, strict=True))


def _rank_coordinates(job: PlannedJob) -> Iterator[tuple[int, ...]]:
    """Yield every rank's place in Megatron's groups, in order: (pipeline, tensor, expert, expert
    tensor, dense replica, expert replica), the last two among ranks with the same parameters."""
    from megatron.core.parallel_state import RankGenerator

    parallel, order = job.parallel, "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        parallel.tensor, 1, job.data_parallel_size, parallel.pipeline, parallel.context, order
    )
    expert = RankGenerator(
        parallel.expert_tensor,
        parallel.expert,
        job.expert_data_parallel_size,
        parallel.pipeline,
        1,
        order,
    )
    axes = ((dense, "pp"), (dense, "tp"), (expert, "ep"), (expert, "tp"))
    replicas = ((dense, "dp-cp"), (expert, "dp"))
    places = [
        {rank: index for group in groups.get_ranks(axis) for index, rank in enumerate(group)}
        for groups, axis in (*axes, *replicas)
    ]
    for rank in range(job.world_size):
        yield tuple(place[rank] for place in places)
