"""fp16, autocast and strided inputs of every kernel with a loss, against fp64."""

import math

import formulae
import pytest
import torch
from formulae import near
from r1_kernels import linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs

# fp32 sums of some thirty terms of order 10
FP32 = {"atol": 2e-5, "rtol": 2e-5}
POLICY = {"clip_low": 0.2, "clip_high": 0.28, "kl_beta": 0.3, "importance_cap": 1.5}
POLICY |= {"average": "sequence"}
RATIO = {"policy_loss": "sequence", "linear_policy_loss": "token"}
LEAVES = {
    "token_logprobs": ["logits"],
    "policy_loss": ["new"],
    "linear_token_logprobs": ["hidden", "weight"],
    "linear_policy_loss": ["hidden", "weight"],
}


def inputs():
    """Tensors of all four kernels, fp64; the policies are near each other."""
    tokens = 13
    hidden, weight, targets = formulae.problem(tokens, spread=0.3)
    logits = hidden @ weight.t()
    p = formulae.policy_problem(tokens)
    new, _ = formulae.logprobs_and_entropy(logits, targets)
    for name in ("old", "ref", "rollout"):
        p[name] += new - p["new"]
    up, up_entropy = torch.linspace(-1, 1, tokens), torch.linspace(1, 2, tokens)
    p |= {"new": new, "up": up.double(), "up_entropy": up_entropy.double()}
    return p | {"hidden": hidden, "weight": weight, "logits": logits, "targets": targets}


def results(kernel, p, backend=None):
    """The kernel's loss and its gradients; without a backend, those of the formulae."""
    leaves = [p[name].detach().requires_grad_() for name in LEAVES[kernel]]
    q = p | dict(zip(LEAVES[kernel], leaves, strict=True))
    loss = (plain if backend is None else ours)(kernel, q, backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def ours(kernel, q, backend):
    head = q["hidden"], q["weight"], q["targets"]
    if kernel == "token_logprobs":
        return weighed(*token_logprobs(q["logits"], q["targets"], backend=backend), q)
    if kernel == "linear_token_logprobs":
        return weighed(*linear_token_logprobs(*head, backend=backend), q)
    tokens = q["old"], q["ref"], q["advantages"], q["mask"]
    more = {"rollout_logprobs": q["rollout"], "cu_seqlens": q["cu_seqlens"], "backend": backend}
    options = POLICY | more | {"ratio_level": RATIO[kernel]}
    if kernel == "policy_loss":
        return policy_loss(q["new"], *tokens, **options).loss
    return linear_policy_loss(*head, *tokens, **options).loss


def plain(kernel, q, backend):
    logits = q["hidden"] @ q["weight"].t() if kernel.startswith("linear") else q["logits"]
    new, entropy = formulae.logprobs_and_entropy(logits, q["targets"])
    if kernel.endswith("logprobs"):
        return weighed(new, entropy, q)
    tokens = q["old"], q["ref"], q["advantages"], q["mask"]
    more = {"rollout": q["rollout"], "cu_seqlens": q["cu_seqlens"], "ratio_level": RATIO[kernel]}
    return formulae.policy_loss(
        q["new"] if kernel == "policy_loss" else new, *tokens, **POLICY, **more
    )


def weighed(logprobs, entropy, q):
    return (logprobs * q["up"] + entropy * q["up_entropy"]).sum()


def converted(p, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in p.items()}


def strided(tensor):
    """The same values, every second one in each dimension of a larger tensor."""
    filler = math.nan if tensor.is_floating_point() else 0
    whole = tensor.new_full([2 * size for size in tensor.shape], filler)
    view = whole[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("kernel", LEAVES)
def test_strided_inputs(backend, kernel):
    p = inputs()
    given = {name: strided(tensor) for name, tensor in converted(p, torch.float32).items()}
    assert not any(tensor.is_contiguous() for tensor in given.values())
    for got, want in zip(results(kernel, given, backend), results(kernel, p), strict=True):
        near(got, want, **FP32)


@pytest.mark.parametrize("kernel", LEAVES)
def test_autocast_rounds_nothing(backend, kernel):
    p = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(kernel, converted(p, torch.float32), backend)
    for got, want in zip(found, results(kernel, p), strict=True):
        assert got.dtype == torch.float32
        near(got, want, **FP32)


@pytest.mark.parametrize("kernel", LEAVES)
def test_fp16_is_off_by_its_rounding(backend, kernel):
    given = converted(inputs(), torch.float16)
    expected = results(kernel, converted(given, torch.float64))
    (loss, *gradients), (want, *wanted) = results(kernel, given, backend), expected
    # On a CPU the heads' products come rounded to fp16: 2^-11 of logits up to 4.
    near(loss, want, atol=0, rtol=2e-3 if kernel.startswith("linear") else 1e-5)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float16
        assert (got.double() - gradient).norm() < 2e-3 * gradient.norm()


@pytest.mark.parametrize("vocab", [29, 32])
def test_bf16_does_not_depend_on_what_fresh_memory_holds(monkeypatch, vocab):
    # oneDNN's products of 40 rows and more read one element beyond rows of an odd length.
    hidden, weight, targets = formulae.problem(tokens=80, hidden=48, vocab=vocab)
    leaves = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *size, **options):
        return new_empty(self, *size, **options).fill_(math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
    logprobs, _ = linear_token_logprobs(*leaves, targets, backend="torch")
    for gradient in torch.autograd.grad(logprobs.sum(), leaves):
        assert gradient.isfinite().all()
