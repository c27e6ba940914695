"""Rotary angles gathered at once, against Megatron's loop over samples."""

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_r1.models.context_parallel import positions_of_rank
from megatron_r1.models.packed_rotary import rotate_packed, sample_positions

MEGATRON = rope_utils._apply_rotary_pos_emb_thd


class Group:
    """A context-parallel group, as far as angles need one."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("lengths", [[4], [8, 4, 12], [4, 4]])
def test_equal_to_megatron_s_on_every_rank(ranks, latent, lengths):
    assert MEGATRON is not rotate_packed, "the module was patched before this test"
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    # One more position than the longest sample: Megatron reads a table as long as the batch
    # otherwise.
    freqs = torch.randn(max(lengths) + 1, 1, 1, 6)
    for rank in range(ranks):
        held = positions_of_rank(cu_seqlens, rank, ranks)
        t = torch.randn(len(held), 2, 10)
        settings = {"multi_latent_attention": latent, "mscale": 1.3, "cp_group": Group(rank, ranks)}
        got = rotate_packed(t, cu_seqlens, freqs, **settings)
        assert torch.equal(got, MEGATRON(t, cu_seqlens, freqs, **settings))


def test_positions_count_within_each_sample():
    cu_seqlens = torch.tensor([0, 3, 3, 5])
    assert sample_positions(cu_seqlens).tolist() == [0, 1, 2, 0, 1]
    split = [sample_positions(torch.tensor([0, 4, 12]), rank, 2).tolist() for rank in (0, 1)]
    assert split == [[0, 3, 0, 1, 6, 7], [1, 2, 2, 3, 4, 5]]
