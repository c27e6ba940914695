"""The Triton kernels compiled, at sizes beyond the interpreter, on one GPU of 80 GB or more."""

import math
import os

import pytest
import torch
from r1_kernels import (
    SamplingMask,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    quantize_blockwise,
    reference,
    token_logprobs,
)

pytestmark = pytest.mark.skipif("NULL_GPUS" in os.environ, reason="a null GPU runs no kernels")
DEVICE = "cuda"

VOCABULARY = 129_280
# fp32 sums of up to 129,280 terms, exponentials accurate to 2 ulp
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def logits_and_targets(rows, columns, dtype=torch.bfloat16, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    for part in logits.split(4096):
        part.normal_(0, 3, generator=g)
    return logits, torch.randint(columns, (rows,), generator=g, device=DEVICE)


def fp64_rows(logits, targets, rows, temperature=1.0):
    z = logits[rows].double().requires_grad_()
    log_p = torch.log_softmax(z / temperature, -1)
    logprobs = log_p.gather(-1, targets[rows, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return z, logprobs, entropy


def some_rows(count, edges=64):
    """First, last and a spread of rows."""
    spread = torch.linspace(0, count - 1, min(count, edges)).long()
    return spread.to(DEVICE).unique()


def check_from_logits(logits, targets, temperature=0.8):
    rows = some_rows(len(logits))
    z, want, want_entropy = fp64_rows(logits, targets, rows, temperature)
    (want.sum() + want_entropy.sum()).backward()
    leaf = logits.requires_grad_()
    scratch = leaf * 1.0  # the gradient is written over it
    options = {"temperature": temperature, "inplace_backward": True}
    got, entropy = token_logprobs(scratch, targets, **options)
    torch.testing.assert_close(got[rows].double(), want.detach(), **FP32)
    torch.testing.assert_close(entropy[rows].double(), want_entropy.detach(), **FP32)
    assert (got <= 0).all()
    (grad,) = torch.autograd.grad(got.sum() + entropy.sum(), scratch)
    assert grad.data_ptr() == scratch.data_ptr()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(grad.dtype, 1e-5)
    torch.testing.assert_close(grad[rows].double(), z.grad, atol=1e-6, rtol=rounding)


@pytest.mark.parametrize("tokens", [65_535, 65_536, 65_537])
def test_64k_rows_of_a_shard(tokens):
    check_from_logits(*logits_and_targets(tokens, VOCABULARY // 8))


@pytest.mark.parametrize("elements", [2**31, 2**32])
@pytest.mark.parametrize("side", [-1, 1])
def test_element_counts_around_2_to_the_31_and_32(elements, side):
    columns = VOCABULARY
    rows = elements // columns + (side + 1) // 2
    assert (rows * columns > elements) == (side > 0)
    check_from_logits(*logits_and_targets(rows, columns))


@pytest.mark.parametrize("columns", [1, 17, 4097, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_odd_sizes_and_dtypes(columns, dtype):
    check_from_logits(*logits_and_targets(131, columns, dtype))


def head_problem(tokens, hidden, vocab, dtype, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape, std=1.0):
        return std * torch.randn(*shape, generator=g, device=DEVICE)

    h, w = normal(tokens, hidden).to(dtype), normal(vocab, hidden, std=hidden**-0.5).to(dtype)
    y = torch.randint(vocab, (tokens,), generator=g, device=DEVICE)
    base = -math.log(vocab) + normal(tokens)
    old, ref = base + 0.3 * normal(tokens), base + 0.3 * normal(tokens)
    mask = (torch.rand(tokens, generator=g, device=DEVICE) < 0.8).float()
    return h, w, y, old, ref, normal(tokens), mask


SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "kl_beta": 0.04, "entropy_coef": 0.01}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [500, None])
def test_linear_policy_loss_is_the_plain_one_in_fp64(dtype, chunk):
    h, w, *tokens = head_problem(2_000, 512, 32_003, dtype)
    a, b = h.double().requires_grad_(), w.double().requires_grad_()
    want = reference.linear_policy_loss(a, b, *tokens, **SETTINGS)
    want.loss.backward()
    results = []
    for _ in range(2):
        c, d = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = linear_policy_loss(c, d, *tokens, chunk_tokens=chunk, **SETTINGS)
        out.loss.backward()
        results.append((*out, c.grad, d.grad))
    assert all(x.equal(y) for x, y in zip(*results, strict=True))
    # Products of bf16 numbers are exact in fp32, and so are the logits but for their sum.
    torch.testing.assert_close(out.logprobs.double(), want.logprobs, atol=1e-4, rtol=1e-4)
    # TF32 is off by default; bf16 rounds the logits' gradient once and each result once.
    size = 1e-4 if dtype == torch.float32 else 0.01
    for got, expected in ((c.grad, a.grad), (d.grad, b.grad)):
        assert (got.double() - expected).norm() < size * expected.norm()


def test_linear_policy_loss_keeps_one_chunk_and_the_weight_gradient():
    h, w, *tokens = head_problem(16_384, 1_024, VOCABULARY, torch.bfloat16)
    h.requires_grad_(), w.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_policy_loss(h, w, *tokens, chunk_tokens=4_096, **SETTINGS)
    extra = torch.cuda.max_memory_allocated() - before
    chunk = 4_096 * VOCABULARY * (4 + 2)
    assert extra < chunk + 4 * w.numel() + 2 * h.numel() + 64 * 2**20, extra / 2**30
    out.loss.backward()


@pytest.mark.parametrize("kernel", ["linear_policy_loss", "linear_token_logprobs"])
def test_weight_gradients_are_added_to_an_fp32_sum(kernel):
    """Two micro-batches; nothing is rounded to bf16 but the gradients of single logits."""
    h, w, y, *tokens = head_problem(2_000, 512, 32_003, torch.bfloat16)
    total = torch.zeros(w.shape, device=DEVICE)
    d, b = w.clone().requires_grad_(), w.double().requires_grad_()
    for part in (slice(0, 1_000), slice(1_000, None)):
        states, targets, *others = [t[part] for t in (h, y, *tokens)]
        if kernel == "linear_policy_loss":
            settings = {**SETTINGS, "denominator": 1}
            given = targets, *others
            linear_policy_loss(states, d, *given, main_grad=total, **settings).loss.backward()
            reference.linear_policy_loss(states.double(), b, *given, **settings).loss.backward()
        else:
            linear_token_logprobs(states, d, targets, main_grad=total)[0].sum().backward()
            logprobs = torch.log_softmax(states.double() @ b.t(), -1)
            logprobs.gather(-1, targets[:, None]).sum().backward()
    assert not d.grad.any() and not torch.equal(total, total.bfloat16().float())
    assert (total.double() - b.grad).norm() < 0.01 * b.grad.norm()


def test_linear_token_logprobs_of_64k_tokens():
    h, w, y, *_ = head_problem(65_537, 256, VOCABULARY, torch.bfloat16)
    with torch.no_grad():
        got, entropy = linear_token_logprobs(h, w, y)
    rows = some_rows(len(h))
    _, want, want_entropy = fp64_rows(h[rows].double() @ w.double().t(), y[rows], slice(None))
    torch.testing.assert_close(got[rows].double(), want.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy[rows].double(), want_entropy.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("objective", [{"dual_clip": 3.0}, {"objective": "cispo"}])
def test_policy_loss_is_the_plain_one(objective, average, ratio_level):
    *_, old, ref, advantages, mask = head_problem(65_537, 1, 1_000, torch.float32)
    new = (old + 0.1 * torch.randn_like(old)).requires_grad_()
    cu_seqlens = torch.tensor([0, 1, 1, 1_000, 65_000, 65_537], device=DEVICE)
    options = {"average": average, "ratio_level": ratio_level, "cu_seqlens": cu_seqlens}
    settings = {**SETTINGS, **options, "entropy_coef": 0.0, "importance_cap": 2.0, **objective}
    out = policy_loss(new, old, ref, advantages, mask, rollout_logprobs=ref, **settings)
    (grad,) = torch.autograd.grad(out.loss, new)
    wide = [t.detach().double() for t in (new, old, ref, advantages, mask)]
    wide[0].requires_grad_()
    want = reference.policy_loss(*wide, rollout_logprobs=wide[2], **settings)
    (want_grad,) = torch.autograd.grad(want.loss, wide[0])
    torch.testing.assert_close(out.loss.double(), want.loss, **FP32)
    torch.testing.assert_close(grad.double(), want_grad, atol=1e-9, rtol=1e-4)


def test_policy_loss_of_so_many_tokens_that_its_outputs_pass_2_to_the_31():
    tokens = 2**31 // 5 + 1_000
    g = torch.Generator(DEVICE).manual_seed(0)
    old = torch.empty(tokens, device=DEVICE).uniform_(-3, 0, generator=g)
    new = old + 0.1
    ones = torch.ones_like(old)
    out = policy_loss(new, old, old, ones, ones, **{**SETTINGS, "entropy_coef": 0.0})
    ratio = (new - old).exp()
    gap = old - new
    for part in (slice(0, 1_000), slice(-1_000, None)):
        torch.testing.assert_close(out.ratio[part], ratio[part], **FP32)
        kl = gap[part].exp() - gap[part] - 1
        torch.testing.assert_close(out.kl[part], kl, **FP32)
        assert (out.importance[part] == 1).all()


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantization_has_the_cpu_s_bits(block, dtype):
    x, _ = logits_and_targets(1_000, 1_111, dtype)
    q, scale_inv = quantize_blockwise(x, block=block)
    want_q, want_scale = quantize_blockwise(x.cpu(), block=block)
    assert q.cpu().view(torch.uint8).equal(want_q.view(torch.uint8))
    assert scale_inv.cpu().equal(want_scale)


def test_a_sampling_mask_of_a_whole_vocabulary():
    num_kept = 64
    logits, targets = logits_and_targets(8192, VOCABULARY)
    apart = VOCABULARY // num_kept
    every = torch.arange(num_kept, device=DEVICE)
    ids = targets[:, None] % apart + apart * every  # the target among them
    offsets = num_kept * torch.arange(len(logits) + 1, device=DEVICE)
    mask = SamplingMask(ids.flatten().int(), offsets)
    rows = some_rows(len(logits))
    z = logits[rows].double().gather(1, ids[rows]).requires_grad_()
    log_p = torch.log_softmax(z / 0.8, -1)
    want = log_p.gather(1, (ids[rows] == targets[rows, None]).int().argmax(1, keepdim=True))[:, 0]
    want_entropy = -(log_p.exp() * log_p).sum(-1)
    (want.sum() + want_entropy.sum()).backward()
    leaf = logits.requires_grad_()
    scratch = leaf * 1.0  # the gradient is written over it
    options = {"temperature": 0.8, "sampling_mask": mask, "inplace_backward": True}
    got, entropy = token_logprobs(scratch, targets, **options)
    torch.testing.assert_close(got[rows].double(), want.detach(), **FP32)
    torch.testing.assert_close(entropy[rows].double(), want_entropy.detach(), **FP32)
    (grad,) = torch.autograd.grad(got.sum() + entropy.sum(), scratch)
    assert grad.data_ptr() == scratch.data_ptr()
    kept = grad[rows].gather(1, ids[rows]).double()
    torch.testing.assert_close(kept, z.grad, atol=1e-6, rtol=2**-8)
    assert (grad[rows] != 0).sum() <= ids[rows].numel()
