"""Shifts packed tokens by one as Megatron does, sample by sample, and at once:
`shifted_tokens.py`. Fails where the two differ."""

import os
import random

import torch
import torch.distributed as dist
from megatron.core.transformer import multi_token_prediction

from megatron_r1.models import platform
from megatron_r1.models.context_parallel import positions_of_rank
from megatron_r1.models.packed_roll import roll_packed
from megatron_r1.trainer.sequence_packing import TokenSplit, pack_batch
from megatron_r1.trainer.training_sample import Sample

MEGATRON = multi_token_prediction._roll_tensor_packed_seq


def main() -> None:
    platform.prepare_process()
    platform.join_process_group()
    group, draw = dist.group.WORLD, random.Random(3)
    rank, size = dist.get_rank(), int(os.environ["WORLD_SIZE"])
    made = [
        Sample.pack([1] * draw.randrange(1, 4), [draw.randrange(2, 67) for _ in range(length)])
        for length in (1, 9, 2, 14, 5)
    ]
    split = TokenSplit(context_size=size, context_rank=rank, token_multiple=8)
    batch = pack_batch(made, split, torch.device("cpu"), num_mtp_layers=2)
    params = batch.packed_seq_params
    mask = batch.is_response[None].float()
    for depth in range(2):
        for x in (batch.input_ids, batch.position_ids, batch.targets[None], mask):
            expected, expected_sum = MEGATRON(x, -1, -1, params, group)
            got, got_sum = roll_packed(x, -1, -1, params, group)
            assert torch.equal(got, expected) and got.dtype == expected.dtype
            assert got_sum == expected_sum
        mask, _ = MEGATRON(mask, -1, -1, params, group)
        rows = params.mtp_target_rows[depth]
        assert torch.equal(rows, mask[0].nonzero()[:, 0]), f"MTP layer {depth} on rank {rank}"
    held = positions_of_rank(params.cu_seqlens_q, rank, size)
    assert len(held) == batch.input_ids.numel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
