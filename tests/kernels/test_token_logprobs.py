"""token_logprobs, from logits that exist, against fp64 log_softmax and its autograd."""

import math

import formulae
import pytest
import torch
from formulae import near
from r1_kernels import token_logprobs
from refusals import raised

BF16 = {"atol": 1e-6, "rtol": 2**-8}  # one rounding
# fp32 sums of a few hundred terms, in exponentials accurate to 2 ulp
FP32 = {"atol": 2e-6, "rtol": 2e-6}


def expected(logits, targets, up, up_entropy, temperature=1.0):
    z = logits.double().requires_grad_()
    logprobs, entropy = formulae.logprobs_and_entropy(z, targets, temperature)
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
    want = expected(logits, targets, up, up_entropy, temperature)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        scratch = leaf * 1.0
        got, entropy = token_logprobs(
            scratch, targets, temperature=temperature, inplace_backward=inplace, backend=backend
        )
        (got @ up + entropy @ up_entropy).backward()
        near(got, want[0], **FP32, of="log-probabilities", inplace=inplace)
        near(entropy, want[1], **FP32, of="entropy", inplace=inplace)
        near(leaf.grad, want[2], **FP32, of="gradient", inplace=inplace)
        assert inplace == (not scratch.detach().equal(logits))


def test_gradcheck():
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 9, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, targets, temperature=0.7, vocab_size=9, backend="torch"), logits
    )


def test_one_of_the_two_results_alone_has_its_gradient(backend):
    logits, targets = torch.randn(5, 11), torch.arange(5)
    for used in (0, 1):
        leaf = logits.clone().requires_grad_()
        token_logprobs(leaf, targets, backend=backend)[used].sum().backward()
        z = logits.double().requires_grad_()
        formulae.logprobs_and_entropy(z, targets)[used].sum().backward()
        near(leaf.grad, z.grad, **FP32, of=("log-probabilities", "entropy")[used])


def test_bf16_logits_are_read_as_they_are(backend):
    logits = (3 * torch.randn(6, 100)).bfloat16()
    targets = torch.randint(100, (6,))
    ones = torch.ones(6)
    want = expected(logits, targets, ones, ones)
    leaf = logits.clone().requires_grad_()
    got, entropy = token_logprobs(leaf, targets, backend=backend)
    (got.sum() + entropy.sum()).backward()
    near(got, want[0], **FP32)
    near(entropy, want[1], **FP32)
    assert leaf.grad.dtype == torch.bfloat16
    near(leaf.grad, want[2], **BF16)


@pytest.mark.parametrize("real", [1, 20, 31, 32])
def test_padding_columns_get_no_probability_and_no_gradient(backend, real):
    logits = torch.randn(5, 32)
    targets = torch.randint(real, (5,))
    dirty = logits.clone()
    dirty[:, real:] = math.nan
    leaf = dirty.requires_grad_()
    got, entropy = token_logprobs(leaf, targets, vocab_size=real, backend=backend)
    (got.sum() + entropy.sum()).backward()
    ones = torch.ones(5)
    want = expected(logits[:, :real], targets, ones, ones)
    near(got, want[0], **FP32)
    near(leaf.grad[:, :real], want[2], **FP32)
    assert leaf.grad[:, real:].abs().sum() == 0


def test_large_and_infinite_logits_stay_log_probabilities(backend):
    inf = math.inf
    rows = [
        ([-1e30, -1e30 + 1e24, -1e30], 1),  # strongly negative throughout
        ([-inf, 0.0, -inf], 1),  # all the probability in one place
        ([5e4, -5e4, 0.0], 0),
        ([-2e4, -2e4 + 1, -2e4 + 3], 1),
        ([-inf, 1.0, 2.0], 0),  # a token that cannot be: -inf
    ]
    logits = torch.tensor([z for z, _ in rows])
    targets = torch.tensor([y for _, y in rows])
    got, entropy = token_logprobs(logits, targets, backend=backend)
    want = torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]
    near(got, want, **FP32)
    assert (got <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(3) + 1e-6).all()


@pytest.mark.parametrize("banned", [torch.finfo(torch.float32).min, -1e38, -1e36])
def test_banned_tokens_have_no_part_in_entropy_or_gradient(backend, banned):
    logits = torch.randn(4, 3000)
    kept = torch.randn(4, 40)
    logits[:], logits[:, 1000:1040] = banned, kept
    targets = torch.tensor([1000, 1001, 1020, 1039])
    ones = torch.ones(4)
    want = expected(kept, targets - 1000, ones, ones, temperature=0.7)
    leaf = logits.requires_grad_()
    got, entropy = token_logprobs(leaf, targets, temperature=0.7, backend=backend)
    (got.sum() + entropy.sum()).backward()
    near(got, want[0], **FP32)
    near(entropy, want[1], **FP32)
    near(leaf.grad[:, 1000:1040], want[2], **FP32)
    assert leaf.grad[:, :1000].abs().sum() == 0 and leaf.grad[:, 1040:].abs().sum() == 0


def test_gradients_beside_minus_infinity_are_finite(backend):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]], requires_grad=True)
    got, entropy = token_logprobs(logits, torch.tensor([2]), backend=backend)
    (got + entropy).sum().backward()
    z = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    sum(formulae.logprobs_and_entropy(z, torch.tensor([1]))).sum().backward()
    near(logits.grad[:, 1:3], z.grad, **FP32)
    assert logits.grad[0, [0, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_row_is_reported_there_and_nowhere_else(backend, bad):
    logits = torch.randn(3, 40)
    logits[1, 7] = bad
    leaf = logits.requires_grad_()
    got, entropy = token_logprobs(leaf, torch.tensor([1, 2, 3]), backend=backend)
    got.sum().backward()
    assert torch.isnan(got).tolist() == [False, True, False]
    assert torch.isnan(entropy).tolist() == [False, True, False]
    assert torch.isnan(leaf.grad).any(-1).tolist() == [False, True, False]
    nothing = torch.full((2, 40), -math.inf)
    assert torch.isnan(token_logprobs(nothing, torch.zeros(2).long(), backend=backend)[0]).all()


def test_rows_without_upstream_gradient_are_not_touched_by_what_they_hold(backend):
    logits = torch.randn(3, 40)
    logits[1] = math.nan
    leaf = logits.requires_grad_()
    got, _ = token_logprobs(leaf, torch.tensor([1, 2, 3]), backend=backend)
    got[[0, 2]].sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad[1].abs().sum() == 0


def test_views_and_empty_batches(backend):
    g = torch.Generator().manual_seed(1)
    base = torch.randn(9, 64, generator=g)
    targets = torch.randint(21, (9,), generator=g)
    dense = token_logprobs(base[:, 3:24].contiguous(), targets, backend=backend)
    for view in (base[:, 3:24], base.t().contiguous().t()[:, 3:24]):
        assert not view.is_contiguous()
        for a, b in zip(token_logprobs(view, targets, backend=backend), dense, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    empty = torch.zeros(0, 21, requires_grad=True)
    got, entropy = token_logprobs(empty, targets[:0], backend=backend)
    (got.sum() + entropy.sum()).backward()
    assert got.shape == entropy.shape == (0,) and empty.grad.shape == (0, 21)


@pytest.mark.parametrize("elements", [2**31, 2**32])
def test_offsets_beyond_32_bits(backend, elements):
    # Three rows so far apart that the last begins just below, at and above `elements`; the memory
    # in between is never touched, so it is never there.
    for stride in (elements // 2 - 1, elements // 2, elements // 2 + 1):
        whole = torch.empty(2 * stride + 50, dtype=torch.bfloat16)
        logits = whole.as_strided((3, 50), (stride, 1))
        logits.copy_(torch.randn(3, 50))
        targets = torch.tensor([0, 17, 49])
        ones = torch.ones(3)
        want = expected(logits.clone(), targets, ones, ones)
        leaf = logits.requires_grad_()
        scratch = leaf.view_as(leaf)
        got, entropy = token_logprobs(scratch, targets, inplace_backward=True, backend=backend)
        near(got, want[0], **FP32, stride=stride)
        (grad,) = torch.autograd.grad(got.sum() + entropy.sum(), scratch)
        near(grad, want[2], **BF16, stride=stride)
        assert grad.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("tokens", [65_535, 65_536, 65_537])
def test_more_rows_than_16_bits(tokens):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 3, generator=g)
    targets = torch.randint(3, (tokens,), generator=g)
    want = torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]
    got, _ = token_logprobs(logits, targets, backend="torch")
    near(got, want, **FP32)


def test_the_kernels_grid_has_one_dimension_which_may_pass_65535(monkeypatch):
    """The interpreter needs minutes for so many programs; tests/gpu runs them."""
    from r1_kernels.primitives import softmax_triton

    class Launches:
        grids = []

        def __getitem__(self, grid):
            self.grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("row_statistics_kernel", "logits_gradient_kernel"):
        monkeypatch.setattr(softmax_triton, name, Launches())
    logits = torch.zeros(65_537, 1, requires_grad=True)
    got, _ = token_logprobs(logits, torch.zeros(65_537).long(), backend="triton")
    got.sum().backward()
    assert Launches.grids == [(65_537,), (65_537,)]


def test_two_runs_have_the_same_bits(backend):
    logits, targets = torch.randn(20, 700), torch.randint(700, (20,))
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        got, entropy = token_logprobs(leaf, targets, backend=backend)
        (got.sum() + entropy.sum()).backward()
        results.append((got, entropy, leaf.grad))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_an_in_place_backward_pass_runs_once_and_never_over_a_parameter(backend):
    leaf = torch.randn(2, 5, requires_grad=True)
    targets = torch.zeros(2).long()
    with raised(ValueError, "inplace_backward"):
        token_logprobs(leaf, targets, inplace_backward=True, backend=backend)
    with raised(ValueError, "inplace_backward"):
        token_logprobs(leaf.view(2, 5), targets, inplace_backward=True, backend=backend)
    got, _ = token_logprobs(leaf * 1, targets, inplace_backward=True, backend=backend)
    got.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        got.sum().backward()


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ["logits", "(2, 3, 4)"]),
        ({"logits": torch.zeros(2, 4).int()}, ["logits", "torch.int32"]),
        ({"targets": torch.zeros(3).long()}, ["targets", "(2,)", "(3,)"]),
        ({"targets": torch.zeros(2)}, ["targets", "torch.float32"]),
        ({"targets": torch.tensor([0, 4])}, ["targets", "4", "0", "3"]),
        ({"targets": torch.tensor([-100, 1])}, ["targets", "-100"]),
        ({"targets": torch.zeros(2, device="meta").long()}, ["targets", "meta", "logits"]),
        ({"temperature": 0.0}, ["temperature", "0.0"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"vocab_size": 5}, ["vocab_size", "5"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, shows):
    arguments = {"logits": torch.zeros(2, 4), "targets": torch.tensor([0, 1])}
    with raised(ValueError, *shows):
        token_logprobs(**{**arguments, **change})


def test_triton_on_a_cpu_tensor_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with raised(ValueError, "triton", "cpu"):
        token_logprobs(torch.zeros(2, 4), torch.tensor([0, 1]), backend="triton")
