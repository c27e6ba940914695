"""How the head cuts tokens into chunks: rows that products like, and no waiting for the device."""

import formulae
import pytest
import torch
from r1_kernels import linear_head, linear_policy_loss
from r1_kernels.arguments import trusted_values
from r1_kernels.linear_token_logprobs import make_head
from refusals import raised


def head(vocab, chunk_tokens):
    hidden, weight, _ = formulae.problem(4, vocab=vocab)
    return make_head(hidden, weight, 1.0, None, None, chunk_tokens, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [29, 32])
def test_every_row_of_a_buffer_is_aligned(vocab, dtype):
    buffer = head(vocab, 512).buffer(300, dtype)
    assert buffer.shape == (300, vocab)
    assert buffer.stride(0) * buffer.element_size() % 16 == 0


@pytest.mark.parametrize(("tokens", "chunk"), [(1000, 512), (1025, 1024), (300, 512), (0, 512)])
def test_chunks_are_whole_tiles_but_for_the_last(tokens, chunk):
    sizes = [rows.stop - rows.start for rows in head(29, chunk).chunks(slice(0, tokens))]
    assert sum(sizes) == tokens and all(size <= chunk for size in sizes)
    assert all(size % linear_head.CHUNK_STEP == 0 for size in sizes[:-1])
    assert len(sizes) == -(-tokens // chunk)


def test_known_rows_give_the_same_loss_without_waiting_for_the_device(monkeypatch):
    hidden, weight, targets = (t.requires_grad_(t.is_floating_point()) for t in formulae.problem(9))
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1.0])
    advantages = torch.linspace(-1, 1, 9)
    given = (hidden, weight, targets, None, None, advantages, mask)
    found = linear_policy_loss(*given, kl_beta=0.0).loss
    rows = mask.nonzero()[:, 0]
    search = torch.Tensor.nonzero

    def of_a_chunk(mask):
        # PyTorch's primitives, which no GPU uses, search a chunk; a search of all tokens is ours.
        assert len(mask) < 9, "the host waits"
        return search(mask)

    with monkeypatch.context() as patch, trusted_values():
        patch.setattr(torch.Tensor, "nonzero", of_a_chunk)
        known = linear_policy_loss(*given, kl_beta=0.0, rows=rows).loss
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found, known)]
    torch.testing.assert_close([known, *gradients[1]], [found, *gradients[0]], atol=0, rtol=0)


def test_rows_of_another_kind_are_refused():
    hidden, weight, targets = formulae.problem(3)
    ones = torch.ones(3)
    with raised(ValueError, "rows", "int64"):
        linear_policy_loss(
            *(hidden, weight, targets, None, None, ones, ones), rows=ones > 0, kl_beta=0.0
        )
