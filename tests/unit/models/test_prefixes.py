"""Attention to a shared prefix, against the formula on whole sequences."""

from itertools import pairwise

import pytest
import torch

from megatron_r1.models.prefixes import first_positions, prefix_attention, with_prefixes

LENGTHS = [5, 20, 3, 7, 1, 33, 2, 17]
BEFORE = [-1, -1, 0, 0, 1, 1, -1, 0]


def formula(query, key, value, cu_seqlens, scale):
    out, group = [], query.shape[1] // key.shape[1]
    parts = [range(a, b) for a, b in pairwise(cu_seqlens)]
    for own, prefix in zip(parts, BEFORE, strict=True):
        before = [] if prefix < 0 else [*parts[prefix]]
        rows = torch.tensor([*before, *own])
        keys, values = (x[rows].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[own], keys) * scale
        hidden = torch.ones(len(own), len(rows), dtype=torch.bool).triu(len(before) + 1)
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
    got = prefix_attention(*tensors, cu_seqlens, torch.tensor(BEFORE), 0.3)
    wanted = formula(*tensors, cu_seqlens.tolist(), 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=g, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * upstream).sum(), tensors) for out in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_positions_go_on_where_the_prefix_ends():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    assert first_positions(cu_seqlens) is None
    marked = with_prefixes(cu_seqlens, torch.tensor(BEFORE))
    assert first_positions(marked).tolist() == [0, 0, 5, 5, 20, 20, 0, 5]
