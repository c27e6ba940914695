"""The head's weight gradient, added to an fp32 sum over micro-batches, against fp64 autograd."""

import formulae
import pytest
import torch
from formulae import near
from policy_loss_cases import SETTINGS, expected, whole_problem
from r1_kernels import linear_policy_loss, linear_token_logprobs
from refusals import raised

FP32 = {"atol": 1e-5, "rtol": 1e-5}


def policy_loss(hidden, weight, y, p, main_grad=None, **options):
    """The policy loss "k3", at temperature 0.8."""
    q = {k: v.to(hidden.dtype) if v.is_floating_point() else v for k, v in p.items()}
    given = (q["old"], q["ref"], q["advantages"], q["mask"])
    settings = {**SETTINGS["k3"], "temperature": 0.8, "cu_seqlens": q["cu_seqlens"]}
    return linear_policy_loss(
        hidden, weight, y, *given, main_grad=main_grad, **settings, **options
    ).loss


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_the_upstream_gradient_times_a_policy_loss_s_is_added(backend, ratio_level, chunk):
    h, w, y, p = whole_problem()
    *_, grad_hidden, grad_weight = expected(h, w, y, p, SETTINGS["k3"], ratio_level=ratio_level)
    c, d = h.float().requires_grad_(), w.float().requires_grad_()
    before = torch.randn(d.shape)
    total = before.clone()
    options = {"ratio_level": ratio_level, "chunk_tokens": chunk, "backend": backend}
    loss = policy_loss(c, d, y, p, total, **options)
    assert total.equal(before), "the upstream gradient is not known yet"
    (loss * -3.0).backward()
    near(total, before.double() - 3 * grad_weight, **FP32)
    near(c.grad, -3 * grad_hidden, **FP32)
    assert d.grad.dtype == torch.float32 and not d.grad.any()


@pytest.mark.parametrize("chunk", [5, None])
def test_the_gradient_of_log_probabilities_is_added(backend, chunk):
    h, w, y = formulae.problem()
    up = torch.randn(len(h), dtype=torch.float64)
    b = w.clone().requires_grad_()
    (formulae.logprobs_and_entropy(h @ b.t(), y, 0.6)[0] @ up).backward()
    d = w.float().requires_grad_()
    before = torch.randn(d.shape)
    total = before.clone()
    options = {"temperature": 0.6, "chunk_tokens": chunk, "backend": backend}
    got, _ = linear_token_logprobs(h.float(), d, y, main_grad=total, **options)
    (got @ up.float()).backward()
    near(total, before.double() + b.grad, atol=1e-4, rtol=1e-4)
    assert not d.grad.any()


def test_other_uses_of_the_weight_keep_their_gradient():
    """A tied embedding, or the head of another layer."""
    h, w, y = formulae.problem()
    d, total = w.float().requires_grad_(), torch.zeros(w.shape)
    got, _ = linear_token_logprobs(h.float(), d, y, main_grad=total)
    (got.sum() + d[3].sum() * 2).backward()
    of_others = torch.zeros(w.shape)
    of_others[3] = 2.0
    assert d.grad.equal(of_others) and total.any()


def test_a_frozen_weight_adds_nothing():
    h, w, y, p = whole_problem()
    total = torch.zeros(w.shape)
    policy_loss(h.float().requires_grad_(), w.float(), y, p, total).backward()
    linear_token_logprobs(h.float().requires_grad_(), w.float(), y, main_grad=total)[0].sum()
    assert not total.any()


def test_fp32_sums_of_policy_losses_have_the_bits_of_gradients_added_afterwards():
    """Megatron's backward hook adds the gradient to the sum; upstream gradients of 1, as there."""
    added, returned = None, None
    for seed in range(8):
        h, w, y, p = whole_problem()
        c, d = (h + seed / 8).float(), w.float().requires_grad_()
        if added is None:
            added, returned = torch.zeros(d.shape), torch.zeros(d.shape)
        policy_loss(c, d, y, p, added).backward()
        assert not d.grad.any()
        d.grad = None
        policy_loss(c, d, y, p).backward()
        returned.add_(d.grad)
    assert added.equal(returned) and added.any()


def microbatches(dtype):
    """Eight micro-batches of 256 tokens, whose gradients do not cancel: states around 1 and
    advantages of one sign. Exact in `dtype`."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 16, generator=g) / 4).to(dtype)
    for _ in range(8):
        hidden = (1 + 0.5 * torch.randn(256, 16, generator=g)).to(dtype)
        targets = torch.randint(3, (256,), generator=g)
        yield hidden, weight, targets, 0.5 + torch.rand(256, generator=g)


def sums_of_gradients(kernel, dtype):
    """The relative errors of the weight gradient's sum over micro-batches, against fp64: added to
    `main_grad`, and rounded to `dtype` before they are added."""
    exact, added, rounded = (
        torch.zeros(24, 16, dtype=d) for d in (torch.double, *[torch.float] * 2)
    )
    for hidden, weight, targets, advantages in microbatches(dtype):
        b = weight.double().requires_grad_()
        logprobs, _ = formulae.logprobs_and_entropy(hidden.double() @ b.t(), targets)
        (-(advantages.double() * logprobs).sum()).backward()
        exact += b.grad
        for total in (added, rounded):
            d = weight.clone().requires_grad_()
            options = {"main_grad": added if total is added else None, "backend": "torch"}
            if kernel == "linear_policy_loss":
                # On an on-policy step: the gradient is -advantage times that of the logprob.
                ones = torch.ones(256)
                given = (hidden, d, targets, None, None, advantages, ones)
                loss = linear_policy_loss(*given, kl_beta=0.0, denominator=1, **options).loss
            else:
                loss = -(linear_token_logprobs(hidden, d, targets, **options)[0] @ advantages)
            loss.backward()
            total += d.grad.float()
    return [((t - exact).norm() / exact.norm()).item() for t in (added, rounded)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["linear_policy_loss", "linear_token_logprobs"])
def test_gradients_of_16_bits_are_not_rounded_on_their_way_to_the_sum(kernel, dtype):
    added, rounded = sums_of_gradients(kernel, dtype)
    print(f"{kernel} {dtype}: {added:.1e} added in fp32, {rounded:.1e} rounded first")
    # What is left is the rounding of single gradients of logits, which 2,048 tokens average.
    assert added < rounded / 4
    assert added < (2e-4 if dtype == torch.bfloat16 else 3e-5)


@pytest.mark.parametrize(
    ("main_grad", "shows"),
    [
        (torch.zeros(7, 2), ["main_grad", "(7, 3)", "(7, 2)"]),
        (torch.zeros(7, 3, dtype=torch.bfloat16), ["main_grad", "torch.float32", "bfloat16"]),
        (torch.zeros(7, 3, device="meta"), ["main_grad", "meta", "weight"]),
    ],
)
def test_sums_of_another_kind_are_refused(main_grad, shows):
    h, w, y = torch.zeros(4, 3).bfloat16(), torch.zeros(7, 3).bfloat16(), torch.zeros(4).long()
    with raised(ValueError, *shows):
        linear_token_logprobs(h, w, y, main_grad=main_grad)
    with raised(ValueError, *shows):
        ones = torch.ones(4)
        linear_policy_loss(h, w, y, None, None, ones, ones, kl_beta=0.0, main_grad=main_grad)
