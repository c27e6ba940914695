"""linear_token_logprobs against fp64 autograd through the whole matrix of logits."""

import formulae
import pytest
import torch
from formulae import near
from r1_kernels import linear_token_logprobs
from refusals import raised

# fp32 sums of 29 and of 37 terms of order 10
FP32 = {"atol": 1e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize(
    ("chunk", "temperature"),
    [
        *((5, 0.6), (37, 1.0), (None, 0.6)),
        # A launch of every kernel for each of 37 tokens.
        *(pytest.param(1, t, marks=pytest.mark.more) for t in (1.0, 0.6)),
    ],
)
def test_values_and_gradients_match_fp64_autograd(backend, chunk, temperature):
    h, w, y = formulae.problem()
    up, up_entropy = torch.randn(2, len(h), dtype=torch.float64)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    want, want_entropy = formulae.logprobs_and_entropy(a @ b.t(), y, temperature)
    (want @ up + want_entropy @ up_entropy).backward()
    c, d = h.float().requires_grad_(), w.float().requires_grad_()
    options = {"temperature": temperature, "chunk_tokens": chunk, "backend": backend}
    got, entropy = linear_token_logprobs(c, d, y, **options)
    (got @ up.float() + entropy @ up_entropy.float()).backward()
    near(got, want, **FP32, of="log-probabilities")
    near(entropy, want_entropy, **FP32, of="entropy")
    near(c.grad, a.grad, **GRADIENT, of="gradient of hidden")
    near(d.grad, b.grad, **GRADIENT, of="gradient of weight")
    assert got.dtype == entropy.dtype == c.grad.dtype == d.grad.dtype == torch.float32
    with torch.no_grad():
        again = linear_token_logprobs(c, d, y, **options)
    assert again[0].equal(got) and again[1].equal(entropy)


def test_gradcheck():
    h, w, y = formulae.problem(tokens=5, hidden=3, vocab=7)

    def both(a, b):
        return linear_token_logprobs(a, b, y, temperature=0.7, chunk_tokens=2, backend="torch")

    assert torch.autograd.gradcheck(both, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.more
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed_is_made(backend, frozen):
    h, w, y = formulae.problem()
    c = h.float().requires_grad_(frozen != "hidden")
    d = w.float().requires_grad_(frozen != "weight")
    linear_token_logprobs(c, d, y, backend=backend)[0].sum().backward()
    a, b = h.requires_grad_(), w.requires_grad_()
    formulae.logprobs_and_entropy(a @ b.t(), y)[0].sum().backward()
    kept, expected = (d, b) if frozen == "hidden" else (c, a)
    near(kept.grad, expected.grad, **GRADIENT)
    assert (c if frozen == "hidden" else d).grad is None


def test_padded_vocabulary_rows_get_no_probability_and_no_gradient(backend):
    h, w, y = formulae.problem(vocab=20)
    padded = torch.cat([w, torch.full((12, w.shape[1]), torch.nan, dtype=w.dtype)])
    c, d = h.float().requires_grad_(), padded.float().requires_grad_()
    got, entropy = linear_token_logprobs(c, d, y, vocab_size=20, backend=backend)
    want, want_entropy = formulae.logprobs_and_entropy(h @ w.t(), y)
    near(got, want, **FP32)
    near(entropy, want_entropy, **FP32)
    (got.sum() + entropy.sum()).backward()
    assert d.grad[20:].abs().max() == 0
    a = h.requires_grad_()
    sum(formulae.logprobs_and_entropy(a @ w.t(), y)).sum().backward()
    near(c.grad, a.grad, **GRADIENT)


def test_empty_batches_have_gradients_of_zero(backend):
    h = torch.zeros(0, 4, requires_grad=True)
    w = torch.randn(9, 4, requires_grad=True)
    got, entropy = linear_token_logprobs(h, w, torch.zeros(0).long(), backend=backend)
    (got.sum() + entropy.sum()).backward()
    assert got.shape == (0,) and h.grad.shape == (0, 4) and w.grad.abs().sum() == 0


def test_bf16_is_off_by_the_rounding_of_its_logits_only(backend):
    h, w, y = formulae.problem(tokens=40, hidden=64, vocab=200)
    h, w = h.bfloat16(), (w / 8).bfloat16()
    want, _ = formulae.logprobs_and_entropy(h.double() @ w.double().t(), y)
    c, d = h.requires_grad_(), w.requires_grad_()
    got, _ = linear_token_logprobs(c, d, y, backend=backend)
    got.sum().backward()
    assert got.dtype == torch.float32 and c.grad.dtype == d.grad.dtype == torch.bfloat16
    # On a CPU the product comes rounded to bf16: half of 2^-8 of logits up to 4, twice.
    torch.testing.assert_close(got.double(), want, atol=0.016, rtol=0)


def test_a_weight_changed_before_the_backward_pass_is_an_error(backend):
    h, w, y = formulae.problem()
    d = w.float().requires_grad_()
    got, _ = linear_token_logprobs(h.float(), d, y, backend=backend)
    with torch.no_grad():
        d += 1
    with pytest.raises(RuntimeError):
        got.sum().backward()


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        ({"weight": torch.zeros(7, 2)}, ["hidden", "weight"]),
        ({"hidden": torch.zeros(4, 3, 1)}, ["(4, 3, 1)", "(7, 3)"]),
        (
            {"weight": torch.zeros(7, 3).bfloat16()},
            ["weight", "torch.bfloat16", "hidden", "torch.float32"],
        ),
        ({"targets": torch.zeros(5).long()}, ["targets", "(4,)", "(5,)"]),
        ({"targets": torch.full((4,), 7)}, ["targets", "7", "0", "6"]),
        ({"targets": torch.zeros(4, device="meta").long()}, ["targets", "meta", "hidden"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"chunk_tokens": 0}, ["chunk_tokens", "0"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, shows):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "targets": torch.zeros(4).long(),
    }
    with raised(ValueError, *shows):
        linear_token_logprobs(**{**arguments, **change})
