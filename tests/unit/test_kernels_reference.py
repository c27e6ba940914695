"""The plain-PyTorch kernels against fp64 autograd through ordinary operations."""

import math
import sys

import pytest
import torch
from r1_kernels import reference
from r1_kernels.reference import linear_token_logprobs as module_function
from r1_kernels.reference import policy_loss, token_logprobs

linear_module = sys.modules["r1_kernels.reference.linear_token_logprobs"]


def problem(tokens=37, hidden=16, vocab=29, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64)
    y = torch.randint(vocab, (tokens,), generator=g)
    return h, w, y


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 64, 10_000])
def test_linear_logprobs_entropy_and_gradients_match_fp64_autograd(monkeypatch, temperature, chunk):
    monkeypatch.setattr(linear_module, "CHUNK_ELEMENTS", chunk * 3)
    h, w, y = problem()
    up, up_entropy = torch.randn(2, len(h), dtype=torch.float64)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    log_p = torch.log_softmax(a @ b.t() / temperature, -1)
    expected = log_p.gather(-1, y[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (expected @ up + entropy @ up_entropy).backward()

    c, d = h.float().requires_grad_(), w.float().requires_grad_()
    got, got_entropy = reference.linear_token_logprobs(c, d, y, temperature=temperature)
    (got @ up.float() + got_entropy @ up_entropy.float()).backward()
    # fp32 sums of 29 and of 37 terms of order 10
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_entropy, entropy.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c.grad, a.grad.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.grad, b.grad.float(), atol=1e-4, rtol=1e-4)


def test_padded_vocabulary_columns_get_no_probability_and_no_gradient():
    h, w, y = problem(vocab=20)
    padded = torch.cat([w, 100 * torch.ones(12, w.shape[1], dtype=w.dtype)])
    c, d = h.float().requires_grad_(), padded.float().requires_grad_()
    got, entropy = module_function(c, d, y, vocab_size=20)
    expected, expected_entropy = module_function(h.float(), w.float(), y)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    (got.sum() + entropy.sum()).backward()
    assert d.grad[20:].abs().max() == 0
    assert torch.isfinite(c.grad).all()


def test_strongly_negative_and_infinite_logits_stay_log_probabilities():
    logits = torch.tensor([[-1e30, -1e30 + 1e24], [-math.inf, 0.0], [5e4, -5e4]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([1, 1, 0]))
    assert logprobs.tolist()[1:] == [0.0, 0.0]
    assert (logprobs <= 0).all() and not torch.isnan(entropy).any()


def test_policy_loss_matches_a_hand_computation():
    # ratios 2, 0.5 and 1; advantages +1, -1 and +2; clip 0.2 on both sides; beta 0.1.
    old = torch.tensor([-1.0, -1.0, -1.0, 7.0])
    new = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0, math.nan])
    ref = torch.tensor([-1.0, -1.0, -1.0 - math.log(4), 0.0])
    adv = torch.tensor([1.0, -1.0, 2.0, 1.0])
    mask = torch.tensor([0.5, 0.5, 1.0, 0.0])
    kl = [
        math.exp(-math.log(2)) + math.log(2) - 1,
        math.exp(math.log(2)) - math.log(2) - 1,
        math.exp(-math.log(4)) + math.log(4) - 1,
    ]
    expected = 0.5 * (-1.2 + 0.1 * kl[0]) + 0.5 * (0.8 + 0.1 * kl[1]) + (-2 + 0.1 * kl[2])
    out = policy_loss(new, old, ref, adv, mask, clip_low=0.2, clip_high=0.2, kl_beta=0.1)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert out.clipped.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert out.kl.tolist() == pytest.approx([*kl, 0.0], abs=1e-6)


def test_policy_gradient_vanishes_where_the_clip_holds_the_token_back():
    new = torch.tensor([math.log(2), -math.log(2), math.log(2), -math.log(2)], requires_grad=True)
    zeros, ones = torch.zeros(4), torch.ones(4)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = policy_loss(new, zeros, None, adv, ones, clip_low=0.2, clip_high=0.2, kl_beta=0.0)
    out.loss.backward()
    # d(-ratio A)/d logprob = -ratio A where not clipped.
    assert new.grad.tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0])


def test_policy_loss_gradient_passes_gradcheck():
    g = torch.Generator().manual_seed(1)
    new, old, ref, adv = (torch.randn(11, generator=g, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(11, generator=g, dtype=torch.float64)

    def loss(x):
        return policy_loss(x, old, ref, adv, mask, clip_low=10, clip_high=10, kl_beta=0.3).loss

    assert torch.autograd.gradcheck(loss, new.requires_grad_())


def test_a_ratio_of_e_to_the_fifty_stays_finite():
    new = torch.tensor([0.0, -50.0], requires_grad=True)
    out = policy_loss(
        new, torch.tensor([-50.0, 0.0]), torch.tensor([-100.0, 0.0]), torch.ones(2), torch.ones(2)
    )
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(new.grad).all()


def test_kl_without_a_reference_is_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="kl_beta is 0.1, but there are no ref_logprobs"):
        policy_loss(x, x, None, x, x, kl_beta=0.1)


def test_shapes_that_do_not_fit_are_refused_by_name():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), logprobs \(2,\)"):
        policy_loss(x, x, x, torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"targets must be \(4,\), got \(5,\)"):
        module_function(torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(5, dtype=torch.long))
