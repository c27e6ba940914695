"""Megatron's schedule over packed micro-batches, the optimizer step around it, and the reduction of
the metrics over ranks. The policy and the critic both use these functions."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_r1 import platform
from megatron_r1.models.build import process_groups
from megatron_r1.training.distributed import GridPosition
from megatron_r1.training.packed import PackedBatch

Compute = Callable[[PackedBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]
"""(batch, output of the last stage) → (loss, denominator, report), Megatron's loss function."""

Inputs = Callable[[torch.nn.Module, PackedBatch], dict[str, torch.Tensor]]
"""Called before every forward pass; returns further arguments of the model."""


def run_passes(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    compute: Compute,
    *,
    forward_only: bool,
    inputs: Inputs | None = None,
) -> list[Any]:
    """Run forward over `batches` and, unless forward_only (then in evaluation mode), backward.

    Returns the reports of `compute`, one per micro-batch, on the last pipeline stage."""

    def forward_step(iterator, model):
        batch = next(iterator)
        more = inputs(model, batch) if inputs else {}
        out = model(
            batch.input_ids,
            batch.position_ids,
            None,
            packed_seq_params=batch.packed_seq_params,
            **more,
        )
        return out, partial(compute, batch)

    # Routing replay recognises a pass that will be recomputed by the training mode.
    for chunk in chunks if forward_only else ():
        chunk.eval()
    interleaved, groups = len(chunks) > 1, process_groups(chunks)
    schedule = get_forward_backward_func(groups.pp.size(), len(chunks) if interleaved else None)
    # forward_only alone leaves Megatron recording a graph.
    with torch.set_grad_enabled(not forward_only):
        return schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            # Ignored: `variable_seq_lengths` has Megatron send the shape of every micro-batch.
            seq_length=max(batch.input_ids.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(groups.pp, get_model_config(chunks[0])),
            pg_collection=groups,
        )


def optimizer_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: Any,
    learning_rate: float,
    run: Callable[[], list[Any]],
) -> tuple[list[Any], dict[str, float]]:
    """Make one optimizer step with the gradients that `run` computes.

    Returns the reports of `run`, and the metrics grad_norm and step_taken (0 or 1)."""
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    reports = run()
    succeeded, grad_norm, _ = optimizer.step()
    return reports, {"grad_norm": float(grad_norm), "step_taken": float(succeeded)}


def merge_reports(
    reports: list[dict[str, dict[str, Any]]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the sums and the maxima of `reports` over micro-batches."""
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for report in reports:
        for name, value in report["sums"].items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in report["maxima"].items():
            maxima[name] = max(maxima.get(name, -math.inf), float(value))
    return sums, maxima


def reduce_over_data(
    position: GridPosition, sums: dict[str, Any], maxima: dict[str, Any]
) -> dict[str, float]:
    """Reduce metrics over the data- and context-parallel ranks of the last stage; {} elsewhere.

    Of sums named "a/b" and "b" the quotient is returned as "a"."""
    if not position.last_stage:
        return {}
    device = platform.device()
    added = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=device)
    largest = torch.tensor([float(v) for v in maxima.values()], dtype=torch.float64, device=device)
    # Over data and context parallelism: each of these ranks has other samples, or other tokens of
    # the same samples. Ranks of one tensor group have equal numbers and are not added up.
    dist.all_reduce(added, group=position.groups.dp_cp)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=position.groups.dp_cp)
    total = dict(zip(sums, added.tolist(), strict=True))
    metrics = dict(zip(maxima, largest.tolist(), strict=True))
    wholes = {name.rpartition("/")[2] for name in total if "/" in name}
    for name, value in total.items():
        part, _, whole = name.rpartition("/")
        if part:
            metrics[part] = value / total[whole] if total[whole] else 0.0
        elif name not in wholes:
            metrics[name] = value
    return metrics
