"""Pipeline communication for packed micro-batches: receivers know each tensor's shape in advance,
so no shapes are sent."""

from collections.abc import Iterator, Sequence
from functools import partial

from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from torch import Tensor
from torch.distributed import ProcessGroup


class KnownShapesCommunicator(P2PCommunicator):
    """Megatron's communicator of one pass over micro-batches whose lengths are known.

    Every pipeline rank holds the same micro-batches, so a receiver knows how long they are.
    With lengths that vary, Megatron sends the shape of every tensor ahead of it, and the CPU waits
    for the whole device until the shape is there (p2p_communication.py:263, Megatron-Core 0.19.2):
    in every hop of every micro-batch, forward and backward.

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
