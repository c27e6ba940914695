import pytest
import torch

from megatron_r1.models.attention import attend_packed
from megatron_r1.models.length_buckets import BUCKET_TOKENS


def softmax_attention(query, key, value, scale):
    """One sequence, written out: (s, h, d), (s, g, d), (s, g, e) -> (s, h, e)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(later, -torch.inf).softmax(-1), value)


def tensors(lengths, heads, groups, key_size, value_size):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, key_size), (groups, key_size), (groups, value_size)
    return [
        torch.randn(
            sum(lengths), *shape, generator=generator, dtype=torch.float64, requires_grad=True
        )
        for shape in shapes
    ]


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [1, 1, 1],
        [37],
        [BUCKET_TOKENS, BUCKET_TOKENS + 1, BUCKET_TOKENS - 1],
        [5, 64, 1, 5, 31, 80, 79],
        [3, 0, 2],
    ],
    ids=str,
)
@pytest.mark.parametrize("heads, groups, key_size, value_size", [(4, 4, 12, 5), (6, 2, 8, 8)])
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone(
    lengths, heads, groups, key_size, value_size
):
    inputs = tensors(lengths, heads, groups, key_size, value_size)
    weight = torch.randn(sum(lengths), heads, value_size, dtype=torch.float64)
    got = attend_packed(*inputs, torch.tensor(lengths), scale=0.3)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([softmax_attention(*part, scale=0.3) for part in parts])

    # Double precision: only the order of sums differs.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    got_gradients = torch.autograd.grad((got * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for got_gradient, gradient in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=1e-12)


def test_no_token_reaches_another_sequence():
    lengths = [7, 20, 3]
    inputs = tensors(lengths, 2, 2, 4, 4)
    out = attend_packed(*inputs, torch.tensor(lengths), scale=1.0)
    middle = slice(7, 27)
    for gradient in torch.autograd.grad(out[middle].sum(), inputs):
        assert gradient[middle].abs().sum() > 0
        assert gradient[:7].abs().sum() == 0 and gradient[27:].abs().sum() == 0


@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 200], ids=str)
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
def test_softmax_offsets_and_windows_are_those_written_out(heads, groups, window):
    lengths = [5, 64, 1, 31, 17, 16]
    inputs = tensors(lengths, heads, groups, 8, 8)
    offset = torch.linspace(-2, 3, heads, dtype=torch.float64, requires_grad=True)

    def written_out(query, key, value):
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        hidden = (distance < 0) | (distance >= (window or len(query)))
        scores = scores.masked_fill(hidden, -torch.inf)
        sinks = offset[:, None, None].expand(-1, len(query), 1)
        weights = torch.cat([scores, sinks], 2).softmax(2)[..., :-1]
        return torch.einsum("hqk,khe->qhe", weights, value)

    got = attend_packed(*inputs, torch.tensor(lengths), 0.3, offset, window)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([written_out(*part) for part in parts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, dtype=torch.float64)
    pairs = (torch.autograd.grad((x * weight).sum(), [*inputs, offset]) for x in (got, expected))
    for found, gradient in zip(*pairs, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-11)
