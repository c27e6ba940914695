"""Megatron's schedule over packed micro-batches and the optimizer step around it, for the policy
and the critic alike."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_r1.base.processes import timeline
from megatron_r1.models import platform
from megatron_r1.models.build import process_groups
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.stage_communication import KnownShapesCommunicator

OutputFunction = Callable[[PackedMicrobatch, Tensor], Any]
"""(batch, output of the last stage) → (loss, denominator, report), as Megatron's loss function; in
a forward-only pass the report alone."""

ModelInputs = Callable[[torch.nn.Module, PackedMicrobatch], dict[str, Tensor]]
"""Called before every forward pass; returns further arguments of the model."""


def run_passes(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedMicrobatch],
    output_fn: OutputFunction,
    *,
    forward_only: bool,
    make_model_inputs: ModelInputs | None = None,
    runs_mtp: bool = False,
) -> list[Any]:
    """Run forward over `batches` and, unless forward_only (then in evaluation mode), backward.

    Args:
        chunks: this rank's virtual pipeline stages.
        batches: the micro-batches.
        output_fn: computes loss or report from the last stage's output.
        forward_only: whether gradients are left out.
        make_model_inputs: returns further arguments of a chunk's forward pass; None: there are
            none.
        runs_mtp: whether MTP layers run: whether `make_model_inputs` has labels.

    Returns:
        The reports of `output_fn`, one per micro-batch, on the last pipeline stage."""
    # Routing replay recognizes a pass that will be recomputed by the training mode.
    for chunk in chunks if forward_only else ():
        chunk.eval()
    is_interleaved, groups = len(chunks) > 1, process_groups(chunks)
    schedule = get_forward_backward_func(groups.pp.size(), len(chunks) if is_interleaved else None)
    lengths = [batch.input_ids.shape[1] for batch in batches]
    communicator = KnownShapesCommunicator(
        groups.pp,
        get_model_config(chunks[0]),
        lengths,
        len(chunks),
        runs_mtp,
        forward_only=forward_only,
    )
    # forward_only alone leaves Megatron recording a graph.
    with torch.set_grad_enabled(not forward_only):
        reports = schedule(
            forward_step_func=_forward_step(output_fn, make_model_inputs, forward_only),
            data_iterator=[iter(batches) for _ in chunks] if is_interleaved else iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            # Ignored: `variable_seq_lengths` has Megatron ask the communicator for every shape.
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=communicator,
            pg_collection=groups,
        )
    communicator.require_all_received()
    return reports


def _forward_step(
    output_fn: OutputFunction, make_model_inputs: ModelInputs | None, forward_only: bool
) -> Callable[..., tuple[Any, Callable[[Tensor], Any]]]:
    """Return the function that Megatron's schedule calls for one forward pass."""

    def forward_step(
        iterator: Iterator[PackedMicrobatch],
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Callable[[Tensor], Any]]:
        batch = next(iterator)
        arguments = make_model_inputs(model, batch) if make_model_inputs else {}
        # Asked for with parallel.overlap_expert_exchange; `model` is then bare.
        run: Any = model.build_schedule_plan if return_schedule_plan else model
        out = run(
            batch.input_ids,
            batch.position_ids,
            None,
            packed_seq_params=batch.packed_seq_params,
            **arguments,
        )
        return out, partial(loss, batch)

    def loss(batch: PackedMicrobatch, out: Tensor) -> Any:
        if not forward_only:
            return output_fn(batch, out)
        zero = torch.zeros((), device=out.device)
        return zero, zero.int(), output_fn(batch, out)

    return forward_step


def optimizer_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: Any,
    learning_rate: float,
    run: Callable[[], list[Any]],
    *,
    is_last: bool = True,
) -> tuple[list[Any], dict[str, float]]:
    """Make one optimizer step with the gradients that `run` computes.

    Args:
        chunks: the model's chunks in DistributedDataParallel.
        optimizer: Megatron's optimizer of the chunks.
        learning_rate: the learning rate of this update.
        run: runs forward and backward; returns its reports.
        is_last: whether this is the rollout's last update. Its parameters are gathered at once,
            because the next log-probabilities, or a push, need them before the forward pass of the
            next update would gather them.

    Returns:
        The reports of `run`, and the metrics grad_norm and step_taken (0 or 1)."""
    for chunk in chunks:
        chunk.train()
        chunk.restore_grad_buffers(synchronize=False)  # where `free_gradients` has freed them
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with timeline.span("trainer/forward and backward"):
        reports = run()
    with timeline.span("trainer/optimizer"):
        has_succeeded, grad_norm, _ = optimizer.step()
    for chunk in chunks:
        if is_last and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return reports, {"grad_norm": float(grad_norm), "step_taken": float(has_succeeded)}


def free_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Free the memory of the gradients, which the next optimizer step allocates again."""
    for chunk in chunks:
        chunk.offload_grad_buffers(synchronize=platform.has_gpu(), empty_cache=False)
