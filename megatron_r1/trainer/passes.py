"""Megatron's schedule over packed micro-batches, whose shapes each pipeline stage knows beforehand,
and the optimizer step around it, for the policy and the critic alike."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import ModelParallelConfig
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.base.processes import timeline
from megatron_r1.models import platform
from megatron_r1.models.build import process_groups
from megatron_r1.trainer.batch import PackedBatch

OutputFunction = Callable[[PackedBatch, Tensor], Any]
"""(batch, output of the last stage) → (loss, denominator, report), as Megatron's loss function; in
a forward-only pass the report alone."""

ModelInputs = Callable[[torch.nn.Module, PackedBatch], dict[str, Tensor]]
"""Called before every forward pass; returns further arguments of the model."""


def run_passes(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    compute: OutputFunction,
    *,
    forward_only: bool,
    inputs: ModelInputs | None = None,
    runs_mtp: bool = False,
) -> list[Any]:
    """Run forward over `batches` and, unless forward_only (then in evaluation mode), backward.

    Args:
        chunks: this rank's virtual pipeline stages.
        batches: the micro-batches.
        compute: computes loss or report from the last stage's output.
        forward_only: whether gradients are left out.
        inputs: returns further arguments of a chunk's forward pass; None: there are none.
        runs_mtp: whether MTP layers run: whether `inputs` has labels.

    Returns:
        The reports of `compute`, one per micro-batch, on the last pipeline stage."""
    # Routing replay recognizes a pass that will be recomputed by the training mode.
    for chunk in chunks if forward_only else ():
        chunk.eval()
    interleaved, groups = len(chunks) > 1, process_groups(chunks)
    schedule = get_forward_backward_func(groups.pp.size(), len(chunks) if interleaved else None)
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
            forward_step_func=_forward_step(compute, inputs, forward_only),
            data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
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
    compute: OutputFunction, inputs: ModelInputs | None, forward_only: bool
) -> Callable[..., tuple]:
    """Return the function that Megatron's schedule calls for one forward pass."""

    def forward_step(
        iterator: Iterator[PackedBatch], model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple:
        batch = next(iterator)
        arguments = inputs(model, batch) if inputs else {}
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

    def loss(batch: PackedBatch, out: Tensor) -> Any:
        if not forward_only:
            return compute(batch, out)
        zero = torch.zeros((), device=out.device)
        return zero, zero.int(), compute(batch, out)

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
        learning_rate: the learning rate of this step.
        run: runs forward and backward; returns its reports.
        is_last: whether this is the rollout's last update. Its parameters are gathered at once,
            because scoring or a push reads them before the forward pass of the next update would
            gather them.

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
        succeeded, grad_norm, _ = optimizer.step()
    for chunk in chunks:
        if is_last and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return reports, {"grad_norm": float(grad_norm), "step_taken": float(succeeded)}


def free_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Free the memory of the gradients, which the next optimizer step allocates again."""
    for chunk in chunks:
        chunk.offload_grad_buffers(synchronize=platform.has_gpu(), empty_cache=False)


class KnownShapesCommunicator(P2PCommunicator):
    """Megatron's communicator of one pass over micro-batches whose lengths are known.

    Every pipeline rank holds the same micro-batches, so a receiver knows how long they are.
    Megatron, which is told of lengths that vary, has each rank send the shape of every tensor ahead
    of it, and the host wait for the whole device until it is there (p2p_communication.py:242,
    Megatron-Core 0.16.1): in every hop of every micro-batch, forward and backward.

    Shapes: T tokens of a micro-batch on a context rank, t ranks that share a sequence, H hidden
    size, d MTP layers. A hop carries (T / t, 1, H); behind a stage of MTP layers, in a pass that
    runs them, ((1 + d) T / t, 1, H).

    Args:
        group: the pipeline-parallel ranks.
        config: the model's configuration.
        lengths: T of each micro-batch.
        num_chunks: virtual stages of a rank.
        runs_mtp: whether MTP layers run in this pass.
        forward_only: whether no gradients come back."""

    def __init__(
        self,
        group: ProcessGroup,
        config: TransformerConfig,
        lengths: Sequence[int],
        num_chunks: int,
        runs_mtp: bool,
        *,
        forward_only: bool,
    ):
        super().__init__(group, config)
        shapes = partial(
            shapes_to_receive, config, lengths, num_chunks, runs_mtp, group.rank(), group.size()
        )
        self._forward = shapes(forward=True)
        self._backward = iter(()) if forward_only else shapes(forward=False)

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Return the shapes of what comes from the rank before and from the one behind."""
        empty_shape = [0, 0, 0]
        return (
            next(self._forward) if recv_prev else empty_shape,
            next(self._backward) if recv_next else empty_shape,
        )

    def require_all_received(self) -> None:
        """Raise RuntimeError where the pass has received less than was expected of it: Megatron's
        schedule is then another one than this module describes, and shapes may have been wrong."""
        if num_missing := len([*self._forward, *self._backward]):
            raise RuntimeError(
                f"{num_missing} tensors of other pipeline stages were never received"
            )


def shapes_to_receive(
    config: TransformerConfig | ModelParallelConfig,
    lengths: Sequence[int],
    num_chunks: int,
    runs_mtp: bool,
    rank: int,
    num_ranks: int,
    *,
    forward: bool,
) -> Iterator[list[int]]:
    """Yield the shapes of the tensors that a pipeline rank receives in a pass, in their order.

    Args:
        config: the model's configuration.
        lengths: T of each micro-batch.
        num_chunks: virtual stages of a rank.
        runs_mtp: whether MTP layers run in this pass.
        rank: the receiver.
        num_ranks: the pipeline ranks.
        forward: hidden states of the stages before; else gradients of the stages behind."""
    if num_ranks == 1:
        return
    order = [(number, 0) for number in range(len(lengths))]
    if num_chunks > 1:
        group_size = config.microbatch_group_size_per_vp_stage
        order = get_schedule_table(len(lengths), num_chunks, group_size)
    # What the first stage computes first comes from no other rank; in a backward pass chunks take
    # their turns from the last one on, and the last stage's first gradient is its own.
    is_leading = rank == (0 if forward else num_ranks - 1)
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    mtp_stage = _mtp_stage(config, num_chunks) if runs_mtp else None
    for number, turn in order:
        if is_leading and turn == num_chunks - 1:
            continue  # its sender, the last stage of the pass, sends nothing on
        chunk = turn if forward else num_chunks - 1 - turn
        # The sender's stage; of a gradient, the receiver's: it has the shape of what was sent.
        sender = chunk * num_ranks + rank - 1 if forward else chunk * num_ranks + rank
        if is_leading:
            sender = chunk * num_ranks + num_ranks - 1 if forward else sender - num_ranks
        parts = 1 if mtp_stage is None or sender < mtp_stage else 1 + (config.mtp_num_layers or 0)
        yield [parts * lengths[number] // split, 1, config.hidden_size]


def _mtp_stage(config: TransformerConfig, num_chunks: int) -> int | None:
    """Return the stage of the MTP layers, which sends their hidden states on; None where it is the
    last one, by default."""
    layout = config.pipeline_model_parallel_layout
    if layout is None:
        return None
    ranks = layout.layout
    for chunk in range(num_chunks):
        for rank in range(len(ranks)):
            if LayerType.mtp in ranks[rank][chunk]:
                return chunk * len(ranks) + rank
    return None
