"""The functions with a sampling mask against fp64 softmax of logits that are -inf elsewhere."""

import formulae
import pytest
import torch
from formulae import near
from policy_loss_cases import SETTINGS, drawn_sets, listed, whole_problem
from r1_kernels import SamplingMask, linear_policy_loss, linear_token_logprobs, token_logprobs
from r1_kernels.arguments import trusted_values
from refusals import raised

BF16 = {"atol": 1e-6, "rtol": 2**-8}  # one rounding
FP32 = {"atol": 2e-6, "rtol": 2e-6}
HEAD = {"atol": 1e-5, "rtol": 1e-5}  # products of 16 terms before it


def expected(logits, targets, kept, up, up_entropy, temperature=1.0):
    z = logits.double().requires_grad_()
    logprobs, entropy = formulae.cut_logprobs_and_entropy(z, targets, kept, temperature)
    (logprobs @ up.double() + entropy @ up_entropy.double()).backward()
    return logprobs.detach(), entropy.detach(), z.grad


@pytest.mark.first_cases(4)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab", [1, 2, 29, 300, 5000])
def test_values_and_gradients_match_fp64(backend, vocab, temperature):
    g = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(7, vocab, generator=g)
    targets = torch.randint(vocab, (7,), generator=g)
    up, up_entropy = torch.randn(2, 7, generator=g)
    kept = drawn_sets(7, vocab, targets)
    want = expected(logits, targets, kept, up, up_entropy, temperature)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        got, entropy = token_logprobs(
            leaf * 1.0,
            targets,
            temperature=temperature,
            sampling_mask=listed(kept),
            inplace_backward=inplace,
            backend=backend,
        )
        (got @ up + entropy @ up_entropy).backward()
        near(got, want[0], **FP32, of="log-probabilities", inplace=inplace)
        near(entropy, want[1], **FP32, of="entropy", inplace=inplace)
        near(leaf.grad, want[2], **FP32, of="gradient", inplace=inplace)
        assert leaf.grad[~kept].abs().sum() == 0, inplace
        assert got[0] == 0 and entropy[0] == 0, "one token is left: it is certain"


def test_gradcheck():
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 9, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, 3, 3])
    mask = listed(drawn_sets(4, 9, targets))
    options = {"temperature": 0.7, "sampling_mask": mask, "backend": "torch"}
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, **options), logits)


def test_only_kept_logits_are_read_and_bf16_as_it_is(backend):
    logits = (3 * torch.randn(6, 100)).bfloat16()
    targets = torch.randint(100, (6,))
    kept, ones = drawn_sets(6, 100, targets), torch.ones(6)
    kept[-1, :50] = kept[-1, targets[-1]] = False
    kept[-1, targets[-1]] = True
    want = expected(logits, targets, kept, ones, ones)
    leaf = torch.where(kept, logits, torch.nan).requires_grad_()
    got, entropy = token_logprobs(leaf, targets, sampling_mask=listed(kept), backend=backend)
    (got.sum() + entropy.sum()).backward()
    near(got, want[0], **FP32)
    near(entropy, want[1], **FP32)
    near(leaf.grad, want[2], **BF16)


@pytest.mark.more
def test_a_mask_that_keeps_everything_changes_no_bit(backend):
    h, w, y, p = whole_problem(tokens=21, vocab=29)
    everything = listed(torch.ones(21, 29, dtype=torch.bool))
    tokens = [p[k].float() for k in ("old", "ref", "advantages", "mask")]
    results = []
    for mask in (None, everything):
        c, d = h.float().requires_grad_(), w.float().requires_grad_()
        options = {"sampling_mask": mask, "temperature": 0.8, "backend": backend}
        loss = linear_policy_loss(c, d, y, *tokens, **SETTINGS["k3"], **options)
        logprobs = linear_token_logprobs(c, d, y, chunk_tokens=8, **options)
        logits = token_logprobs(c @ d.t(), y, **options)
        (loss.loss + logprobs[0].sum() + logits[1].sum()).backward()
        results.append([*loss, *logprobs, *logits, c.grad, d.grad])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_log_probabilities_match_fp64(backend, dtype):
    h, w, y = formulae.problem(tokens=37, vocab=129)
    h, w = h.to(dtype).double(), w.to(dtype).double()
    kept = drawn_sets(37, 129, y)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    want = formulae.cut_logprobs_and_entropy(a @ b.t(), y, kept, 0.7)
    (want[0] + 0.5 * want[1]).sum().backward()
    c, d = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    options = {"temperature": 0.7, "chunk_tokens": 16, "backend": backend}
    got = linear_token_logprobs(c, d, y, sampling_mask=listed(kept), **options)
    (got[0] + 0.5 * got[1]).sum().backward()
    # A bf16 product on a CPU rounds the logits, of up to 16.
    by = HEAD if dtype == torch.float32 else {"atol": 0.25, "rtol": 0.03}
    for name, ours, theirs in zip(("logprobs", "entropy"), got, want, strict=True):
        near(ours, theirs, **by, of=name)
    near(c.grad, a.grad, **by, of="gradient of hidden")
    near(d.grad, b.grad, **by, of="gradient of weight")
    left_out = ~kept[:, :].any(0)
    assert d.grad[left_out].abs().sum() == 0


@pytest.mark.first_cases(4)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["dual clip", "k3", "importance", "entropy", "cispo"])
def test_the_policy_loss_and_its_gradients_match_fp64(backend, name, ratio_level):
    h, w, y, p = whole_problem()
    seen = p["mask"] > 0
    kept = drawn_sets(37, 29, y)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    new, entropy = formulae.cut_logprobs_and_entropy(a @ b.t(), y, kept, 0.8)
    for other in ("old", "ref", "rollout"):
        p[other] = new.detach() + 0.3 * torch.randn(37, dtype=torch.float64)
    settings = {"kl_beta": 0.0, **SETTINGS[name]}
    rollout = p["rollout"] if "importance_cap" in settings else None
    levels = {"ratio_level": ratio_level, "average": "sequence", "cu_seqlens": p["cu_seqlens"]}
    tokens = [p[k] for k in ("old", "ref", "advantages", "mask")]
    want = formulae.policy_loss(
        new, *tokens, rollout=rollout, entropy=entropy, **SETTINGS[name], **levels
    )
    want.backward()
    # What does not count needs no ids, and may hold a target that does not exist.
    mask = listed(kept & seen[:, None])
    y = torch.where(seen, y, -100)
    for chunk in (4, None):
        c, d = h.float().requires_grad_(), w.float().requires_grad_()
        q = [t.float() for t in tokens]
        out = linear_policy_loss(
            *(c, d, y, q[0], q[1] if settings["kl_beta"] else None, *q[2:]),
            temperature=0.8,
            rollout_logprobs=None if rollout is None else rollout.float(),
            sampling_mask=mask,
            chunk_tokens=chunk,
            backend=backend,
            **settings,
            **levels,
        )
        out.loss.backward()
        with_chunk = {**HEAD, "chunk": chunk}
        near(out.loss, want, **with_chunk, of="loss")
        near(out.logprobs[seen], new[seen], **with_chunk, of="log-probabilities")
        near(out.entropy[seen], entropy[seen], **with_chunk, of="entropy")
        near(c.grad, a.grad, **with_chunk, of="gradient of hidden")
        near(d.grad, b.grad, **with_chunk, of="gradient of weight")


@pytest.mark.more
def test_two_runs_have_the_same_bits(backend):
    logits, targets = torch.randn(20, 700), torch.randint(700, (20,))
    mask, results = listed(drawn_sets(20, 700, targets)), []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        got, entropy = token_logprobs(leaf, targets, sampling_mask=mask, backend=backend)
        (got.sum() + entropy.sum()).backward()
        results.append((got, entropy, leaf.grad))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_views_far_rows_and_empty_batches(backend):
    targets = torch.tensor([0, 17, 49])
    kept, ones = drawn_sets(3, 50, targets), torch.ones(3)
    stride = 2**31 // 2 + 1  # memory in between is never touched
    whole = torch.empty(2 * stride + 50, dtype=torch.bfloat16)
    logits = whole.as_strided((3, 50), (stride, 1))
    logits.copy_(torch.randn(3, 50))
    want = expected(logits.clone(), targets, kept, ones, ones)
    leaf = logits.requires_grad_()
    scratch = leaf.view_as(leaf)
    options = {"sampling_mask": listed(kept), "backend": backend}
    got, entropy = token_logprobs(scratch, targets, inplace_backward=True, **options)
    near(got, want[0], **FP32)
    (grad,) = torch.autograd.grad(got.sum() + entropy.sum(), scratch)
    near(grad, want[2], **BF16)
    empty = torch.zeros(0, 21, requires_grad=True)
    mask = SamplingMask(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    got, _ = token_logprobs(empty, targets[:0], sampling_mask=mask, backend=backend)
    got.sum().backward()
    assert got.shape == (0,) and empty.grad.shape == (0, 21)


def test_rows_without_upstream_gradient_are_not_touched_by_what_they_hold(backend):
    targets = torch.tensor([1, 2, 3])
    kept, logits = drawn_sets(3, 40, targets), torch.randn(3, 40)
    logits[1] = torch.nan
    leaf = logits.requires_grad_()
    got, _ = token_logprobs(leaf, targets, sampling_mask=listed(kept), backend=backend)
    assert torch.isnan(got).tolist() == [False, True, False]
    got[[0, 2]].sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad[1].abs().sum() == 0


def test_a_target_that_was_not_kept_shows_where_values_are_trusted(backend):
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    kept = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    with trusted_values():
        got, _ = token_logprobs(logits, targets, sampling_mask=listed(kept), backend=backend)
    assert torch.isnan(got).tolist() == [False, True, True]


def ids(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "shows"),
    [
        ((torch.tensor([0, 1]), torch.tensor([0, 1, 2])), ["token_ids", "torch.int64"]),
        ((ids(0, 1)[None], torch.tensor([0, 1, 2])), ["token_ids", "(1, 2)"]),
        ((ids(0, 1), torch.tensor([0, 2])), ["offsets", "(3,)", "(2,)"]),
        ((ids(0, 1), ids(0, 1, 2)), ["offsets", "torch.int32"]),
        ((ids(0, 1), torch.tensor([0, 1, 3])), ["offsets", "2", "3"]),
        ((ids(0, 1, 2), torch.tensor([0, 4, 3])), ["offsets", "fall"]),
        ((ids(0, 4), torch.tensor([0, 1, 2])), ["token_ids", "4", "0 to 3"]),
        ((ids(0, -1, 1), torch.tensor([0, 1, 3])), ["token_ids", "-1"]),
        ((ids(0, 1, 1), torch.tensor([0, 1, 3])), ["token 1", "1 after 1"]),
        ((ids(2, 0, 1), torch.tensor([0, 2, 3])), ["token 0", "0 after 2"]),
        ((ids(0, 2), torch.tensor([0, 1, 2])), ["token 1", "target 1"]),
        ((ids(0), torch.tensor([0, 1, 1])), ["0 ids for token 1"]),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(mask, shows):
    logits, targets = torch.zeros(2, 4), torch.tensor([0, 1])
    with raised(ValueError, "sampling_mask", *shows):
        token_logprobs(logits, targets, sampling_mask=SamplingMask(*mask))
    hidden = torch.zeros(2, 3)
    weight = torch.zeros(4, 3)
    zeros = torch.zeros(2)
    ones = torch.ones(2)
    with raised(ValueError, "sampling_mask", *shows):
        linear_policy_loss(
            *(hidden, weight, targets, zeros, zeros, zeros, ones), sampling_mask=SamplingMask(*mask)
        )
