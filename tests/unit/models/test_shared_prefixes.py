"""Attention to a shared prefix, against the formula on whole sequences."""

from itertools import pairwise

import pytest
import torch

from megatron_r1.models.packed_rotary import sample_positions
from megatron_r1.models.prefix_attention import prefix_attention
from megatron_r1.models.shared_prefixes import (
    SharedPrefixes,
    mark_prefixes,
    marked_prefixes,
    whole_sequences,
)

LENGTHS = [5, 20, 3, 7, 1, 33, 2, 17, 4, 6]
HOST = [-1, -1, 0, 0, 1, 1, -1, 0, 5, 8]
FIRST = [0, 0, 5, 2, 20, 13, 0, 1, 30, 33]
"""Two segments continue segment 0 at other places than its end; 8 continues 5, which continues 1,
and 9 continues 8."""


def formula(query, key, value, cu_seqlens, scale):
    out, group = [], query.shape[1] // key.shape[1]
    whole = []
    for (start, end), host, first in zip(pairwise(cu_seqlens), HOST, FIRST, strict=True):
        whole.append([*(whole[host][:first] if host >= 0 else []), *range(start, end)])
    for own, rows in zip(pairwise(cu_seqlens), map(torch.tensor, whole), strict=True):
        keys, values = (x[rows].repeat_interleave(group, 1) for x in (key, value))
        count = own[1] - own[0]
        scores = torch.einsum("qhd,khd->hqk", query[slice(*own)], keys) * scale
        hidden = torch.ones(count, len(rows), dtype=torch.bool).triu(len(rows) - count + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khe->qhe", weights, values))
    return torch.cat(out)


@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (12, 8), (6, 10)])
def test_values_and_gradients_are_the_formula_s(size, value_size):
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    shapes = (6, size), (2, size), (2, value_size)
    tensors = [torch.randn(sum(LENGTHS), *s, generator=g, dtype=torch.float64) for s in shapes]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    continued = SharedPrefixes(torch.tensor(HOST), torch.tensor(FIRST))
    got = prefix_attention(*tensors, cu_seqlens, continued, 0.3)
    wanted = formula(*tensors, cu_seqlens.tolist(), 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=g, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * upstream).sum(), tensors) for out in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_whole_sequences_have_every_token_before_a_segment():
    """By hand: segment 2 continues 1 after 4 of its tokens, of which 3 are segment 0's."""
    continued = SharedPrefixes(torch.tensor([-1, 0, 1]), torch.tensor([0, 3, 4]))
    whole = whole_sequences(torch.tensor([0, 4, 6, 9]), continued)
    sequences = [0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 2, 4, 6, 7, 8]
    assert whole.rows.tolist() == [row for each in sequences for row in each]
    assert whole.cu_seqlens.tolist() == [0, 4, 9, 16] and whole.longest == 7


def test_positions_go_on_where_the_prefix_ends():
    cu_seqlens = torch.tensor([0, 4, 6, 9]).int()
    assert marked_prefixes(cu_seqlens) is None
    assert sample_positions(cu_seqlens).tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    continued = SharedPrefixes(torch.tensor([-1, 0, 1]), torch.tensor([0, 3, 4]))
    marked = mark_prefixes(cu_seqlens, continued)
    assert sample_positions(marked).tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 6]
