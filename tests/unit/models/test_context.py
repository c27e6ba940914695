"""The split of a packed batch over context-parallel ranks."""

import pytest
import torch
from refusals import raised

from megatron_r1.models.context_parallel import concat_ranges, gathered_order, positions_of_rank
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

BORDERS = torch.tensor([0, 8, 12, 24])


def test_each_rank_holds_an_early_and_the_matching_late_chunk_by_hand():
    assert positions_of_rank(BORDERS, 0, 2).tolist() == [0, 1, 6, 7, 8, 11, 12, 13, 14, 21, 22, 23]
    assert positions_of_rank(BORDERS, 1, 2).tolist() == [2, 3, 4, 5, 9, 10, 15, 16, 17, 18, 19, 20]
    assert positions_of_rank(BORDERS, 0, 1).tolist() == list(range(24))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_together_hold_every_token_once_and_gathering_restores_the_order(ranks):
    cu_seqlens = torch.tensor([0, 1, 3, 3, 8]) * 2 * ranks
    shares = [positions_of_rank(cu_seqlens, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {16}
    gathered = torch.cat(shares)
    assert gathered[gathered_order(cu_seqlens, ranks)].tolist() == list(range(16 * ranks))


def test_a_sample_that_cannot_be_split_is_refused():
    with raised(ValueError, 4, 2):
        positions_of_rank(torch.tensor([0, 6]), 0, 2)


def test_spans_by_hand():
    assert concat_ranges(torch.tensor([3, 9, 5]), torch.tensor([2, 0, 3])).tolist() == [
        3,
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shares_of_a_batch_are_the_batch_padded_sample_by_sample(ranks):
    cpu = torch.device("cpu")
    samples = [
        Sample.pack([7, 8, 9], [10, 11], [-0.5, -0.25], outcome_advantage=2.0),
        Sample.pack([5], [6, 1, 2, 4, 3, 2, 1, 9], [-1.0] * 8, outcome_advantage=-1.0),
    ]
    shares = [
        pack_batch(samples, TokenSplit(tensor_size=2, context_size=ranks, context_rank=rank), cpu)
        for rank in range(ranks)
    ]
    cu_seqlens = shares[0].packed_seq_params.cu_seqlens_q.long()
    order = gathered_order(cu_seqlens, ranks)
    # Lengths 5 and 9 up to multiples of 2 * ranks, all to one of 2 * ranks tokens.
    assert cu_seqlens.tolist() == {2: [0, 8, 20], 4: [0, 8, 24]}[ranks]

    def whole(name):
        parts = [getattr(share, name).reshape(-1) for share in shares]
        return torch.cat(parts)[order]

    seen = whole("is_response")
    assert whole("targets")[seen].tolist() == [10, 11, 6, 1, 2, 4, 3, 2, 1, 9]
    assert whole("advantages")[seen].tolist() == [2.0] * 2 + [-1.0] * 8
    assert whole("rollout_logprobs")[seen].tolist() == [-0.5, -0.25] + [-1.0] * 8
    assert whole("position_ids")[:8].tolist() == list(range(8))
    assert sum(share.num_responses for share in shares) == 2
    for share in shares:
        assert share.cu_seqlens[-1] == share.input_ids.shape[1] == len(order) // ranks
        assert torch.equal(share.response_positions, share.is_response.nonzero()[:, 0])
