"""policy_loss against autograd through the papers' formulae."""

import math

import formulae
import pytest
import torch
from formulae import near
from policy_loss_cases import SETTINGS
from r1_kernels import policy_loss
from r1_kernels.registry import load_primitives
from refusals import raised


def ours(p, settings, backend, dtype, **options):
    p = {k: v.to(dtype) if v.is_floating_point() else v for k, v in p.items()}
    settings = {"kl_beta": 0.0, **settings}
    new = p["new"].requires_grad_()
    entropy = (2 + p["ref"].detach().sin()).requires_grad_()
    out = policy_loss(
        new,
        p["old"],
        p["ref"] if settings["kl_beta"] else None,
        p["advantages"],
        p["mask"],
        **settings,
        entropy=entropy,
        rollout_logprobs=p["rollout"] if "importance_cap" in settings else None,
        cu_seqlens=p["cu_seqlens"],
        backend=backend,
        **options,
    )
    out.loss.backward()
    return out, new.grad, entropy.grad


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_match_autograd(backend, name, ratio_level, average):
    p, settings = formulae.policy_problem(), SETTINGS[name]
    levels = {"ratio_level": ratio_level, "average": average}
    new = p["new"].clone().requires_grad_()
    entropy = (2 + p["ref"].sin()).requires_grad_()
    expected = formulae.policy_loss(
        new,
        p["old"],
        p["ref"],
        p["advantages"],
        p["mask"],
        rollout=p["rollout"] if "importance_cap" in settings else None,
        entropy=entropy,
        cu_seqlens=p["cu_seqlens"],
        **settings,
        **levels,
    )
    expected.backward()
    dtype = torch.float64 if backend == "torch" else torch.float32
    # fp64: rounding only. fp32: sums of some forty terms of order 1.
    tolerance = (
        {"atol": 1e-12, "rtol": 1e-12} if backend == "torch" else {"atol": 2e-6, "rtol": 2e-6}
    )
    out, grad, grad_entropy = ours(p, settings, backend, dtype, **levels)
    near(out.loss, expected.detach(), **tolerance, of="loss", **settings)
    near(grad, new.grad, **tolerance, of="gradient of logprobs", **settings)
    if "entropy_coef" in settings:
        near(grad_entropy, entropy.grad, **tolerance, of="gradient of entropy", **settings)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["dual clip", "k1", "k2", "k3", "importance"])
def test_gradcheck(name, ratio_level):
    p = formulae.policy_problem(tokens=11, seed=3)

    def loss(new):
        return policy_loss(
            new,
            p["old"],
            p["ref"],
            p["advantages"],
            p["mask"],
            rollout_logprobs=p["rollout"],
            cu_seqlens=torch.tensor([0, 4, 11]),
            ratio_level=ratio_level,
            **{"importance_cap": 2.0, **SETTINGS[name]},
        ).loss

    assert torch.autograd.gradcheck(loss, p["new"].requires_grad_())


def test_fp64_stays_fp64_whatever_the_mask_is():
    p = formulae.policy_problem()
    args = [p[k] for k in ("new", "old", "ref", "advantages")]
    mask = p["mask"] > 0
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.1}
    want = formulae.policy_loss(*args, mask.double(), **settings)
    assert policy_loss(*args, mask, **settings).loss.item() == pytest.approx(want.item(), rel=1e-14)
    with raised(ValueError, "fp32", "fp64"):
        policy_loss(*args, mask, **settings, backend="triton")


def test_a_hand_computation(backend):
    # ratios 2, 0.5 and 1; advantages +1, -1 and +2; clip 0.2 on both sides; beta 0.1.
    old = torch.tensor([-1.0, -1.0, -1.0, 7.0])
    new = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0, math.nan])
    ref = torch.tensor([-1.0, -1.0, -1.0 - math.log(4), 0.0])
    adv = torch.tensor([1.0, -1.0, 2.0, 1.0])
    mask = torch.tensor([0.5, 0.5, 1.0, 0.0])
    kl = [0.5 + math.log(2) - 1, 2 - math.log(2) - 1, 0.25 + math.log(4) - 1]
    expected = 0.5 * (-1.2 + 0.1 * kl[0]) + 0.5 * (0.8 + 0.1 * kl[1]) + (-2 + 0.1 * kl[2])
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.1, "backend": backend}
    out = policy_loss(new, old, ref, adv, mask, **settings, denominator=1)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert out.clipped.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert out.ratio.tolist() == pytest.approx([2.0, 0.5, 1.0, 0.0])
    assert out.kl.tolist() == pytest.approx([*kl, 0.0], abs=1e-6)
    mean = policy_loss(new, old, ref, adv, mask, **settings)
    assert mean.loss.item() == pytest.approx(expected / 2, rel=1e-6)


def test_cispo_clips_the_weight_and_keeps_the_gradient_of_every_token(backend):
    # ratios 2, 0.5 and 1; the weight stays within 0.8 and 1.2, whatever the advantage's sign.
    old = torch.tensor([-1.0, -1.0, -1.0, 7.0])
    new = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0, math.nan])
    adv = torch.tensor([-1.0, 1.0, 2.0, 1.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.0, "objective": "cispo"}
    new.requires_grad_()
    out = policy_loss(new, old, None, adv, mask, **settings, denominator=1, backend=backend)
    out.loss.backward()
    assert new.grad.tolist() == pytest.approx([1.2, -0.8, -2.0, 0.0])
    assert out.clipped.tolist() == [1.0, 1.0, 0.0, 0.0]
    expected = 1.2 * (math.log(2) - 1) - 0.8 * (-math.log(2) - 1) - 2 * -1
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


def test_without_old_logprobs_the_ratio_is_one_and_its_gradient_is_not_lost(backend):
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    adv = torch.tensor([3.0, -1.0])
    out = policy_loss(
        new, None, None, adv, torch.ones(2), kl_beta=0.0, denominator=1, backend=backend
    )
    out.loss.backward()
    assert out.loss.item() == -2.0 and out.ratio.tolist() == [1.0, 1.0]
    assert new.grad.tolist() == [-3.0, 1.0]


def test_a_ratio_of_e_to_the_fifty_stays_finite(backend):
    new = torch.tensor([0.0, -50.0], requires_grad=True)
    old, ref = torch.tensor([-50.0, 0.0]), torch.tensor([-100.0, 0.0])
    out = policy_loss(new, old, ref, torch.ones(2), torch.ones(2), backend=backend)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(new.grad).all()


def test_hidden_tokens_may_hold_anything_and_seen_ones_report_nan(backend):
    bad = torch.tensor([math.nan, math.inf, -math.inf, -1.0])
    good = torch.full((4,), -1.0)
    mask = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for place in range(5):
        tensors = [bad if place == i else good for i in range(5)]
        new = tensors[0].clone().requires_grad_()
        old, ref, adv, rollout = tensors[1:]
        settings = {"rollout_logprobs": rollout, "importance_cap": 2.0, "backend": backend}
        out = policy_loss(new, old, ref, adv, mask, **settings)
        out.loss.backward()
        assert torch.isfinite(out.loss), place
        assert new.grad[:3].tolist() == [0.0, 0.0, 0.0], place
        assert all(t[:3].abs().max() == 0 for t in out[1:]), place
        shown = policy_loss(tensors[0], old, ref, adv, mask.flip(0), **settings)
        assert place == 4 or not torch.isfinite(shown.loss), place


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_nothing_seen_and_no_tokens_at_all_are_a_loss_of_zero(backend, average):
    for tokens in (3, 0):
        new = torch.full((tokens,), math.nan, requires_grad=True)
        zeros = torch.zeros(tokens)
        cu_seqlens = torch.tensor([0, tokens])
        options = {"average": average, "cu_seqlens": cu_seqlens, "backend": backend}
        out = policy_loss(new, zeros, zeros, zeros, zeros, **options)
        out.loss.backward()
        assert out.loss.item() == 0.0, tokens
        assert new.grad.tolist() == [0.0] * tokens, tokens


def test_integer_and_bool_masks_and_reduced_precision(backend):
    p = formulae.policy_problem(tokens=50)
    tensors = [p[k].float() for k in ("new", "old", "ref", "advantages")]
    mask = p["mask"] > 0
    whole = policy_loss(*tensors, mask.float(), backend=backend)
    for other in (mask, mask.long()):
        assert policy_loss(*tensors, other, backend=backend).loss == whole.loss, other.dtype
    low = [t.bfloat16() for t in tensors]
    expected = policy_loss(*[t.float() for t in low], mask, backend=backend)
    got = policy_loss(low[0].requires_grad_(), *low[1:], mask, backend=backend)
    assert got.loss.dtype == torch.float32
    # Widened before anything is subtracted.
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "tokens",
    [1, 511, 513, 65_537, *(pytest.param(n, marks=pytest.mark.more) for n in (65_535, 65_536))],
)
def test_many_tokens_and_two_runs_of_the_same_bits(backend, tokens):
    p = {k: v.float() for k, v in formulae.policy_problem(tokens).items() if k != "cu_seqlens"}
    args = [p[k] for k in ("new", "old", "ref", "advantages", "mask")]
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.1}
    out, again = (policy_loss(*args, **settings, backend=backend) for _ in range(2))
    assert out.loss.equal(again.loss) and out.kl.equal(again.kl)
    expected = formulae.policy_loss(*[t.double() for t in args], **settings)
    # 64K fp32 terms of order 1, half of which cancel
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("length", [0, 1, 2_047, 2_048, 2_049, 4_099])
def test_sums_of_sequences_that_end_inside_a_block_of_2048(backend, length):
    g = torch.Generator().manual_seed(length)
    values = torch.randn(length + 7, generator=g)
    cu_seqlens = torch.tensor([0, 3, 3 + length, 7 + length])
    got = load_primitives(backend).segment_sums(values, cu_seqlens)
    want = torch.stack([part.sum() for part in values.double().split([3, length, 4])])
    # fp32 sums of up to 4,099 numbers of order 1, which nearly cancel
    near(got, want, atol=1e-4, rtol=1e-6, length=length)


def test_k3_of_policies_that_hardly_differ(backend):
    """e^g - g - 1 in fp32 is 0 for |g| < 1e-4."""
    gap = torch.logspace(-7, 1, 200)
    reference = torch.cat([gap, -gap, torch.zeros(1)])
    new = torch.zeros_like(reference, requires_grad=True)
    options = {"kl_beta": 1.0, "denominator": 1, "backend": backend}
    none, ones = torch.zeros_like(reference), torch.ones_like(reference)
    out = policy_loss(new, None, reference, none, ones, **options)
    out.loss.backward()
    g = reference.double()
    near(out.kl, g.expm1() - g, atol=0, rtol=1e-6, of="k3")
    near(new.grad, -g.expm1(), atol=0, rtol=1e-6, of="derivative")


def test_strided_inputs(backend):
    p = formulae.policy_problem(tokens=40)
    names = ("new", "old", "ref", "advantages", "mask")
    dense = [p[k].float() for k in names]
    strided = [torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0] for t in dense]
    assert not strided[0].is_contiguous()
    got = policy_loss(*strided, backend=backend).loss
    assert got.equal(policy_loss(*dense, backend=backend).loss)


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        ({"advantages": torch.zeros(3)}, ["advantages", "(2,)", "(3,)"]),
        ({"mask": torch.zeros(2, 1)}, ["mask", "(2,)", "(2, 1)"]),
        ({"logprobs": torch.zeros(1, 2)}, ["(1, 2)"]),
        ({"old_logprobs": torch.zeros(2).long()}, ["old_logprobs"]),
        ({"ref_logprobs": None}, ["kl_beta", "0.001", "ref_logprobs"]),
        ({"ref_logprobs": torch.zeros(2, device="meta")}, ["ref_logprobs", "meta"]),
        ({"kl_estimator": "k4"}, ["kl_estimator", "'k4'"]),
        ({"clip_low": -0.1}, ["clip_low", "-0.1"]),
        ({"clip_high": math.nan}, ["clip_high", "nan"]),
        ({"dual_clip": 1.0}, ["dual_clip", "1.0", "1"]),
        ({"objective": "gspo"}, ["objective", "'gspo'"]),
        ({"objective": "cispo", "dual_clip": 3.0}, ["dual_clip", "3.0"]),
        ({"importance_cap": 0.0}, ["importance_cap", "0.0"]),
        ({"importance_cap": None, "rollout_logprobs": torch.zeros(2)}, ["importance_cap", "inf"]),
        ({"denominator": 0}, ["denominator", "0"]),
        ({"entropy_coef": 0.1}, ["entropy_coef", "0.1"]),
        ({"average": "mean"}, ["average", "'mean'"]),
        ({"ratio_level": "word"}, ["ratio_level", "'word'"]),
        ({"average": "sequence"}, ["average", "sequence", "cu_seqlens"]),
        ({"ratio_level": "sequence"}, ["ratio_level", "sequence", "cu_seqlens"]),
        (
            {"average": "sequence", "cu_seqlens": torch.tensor([0, 1])},
            ["0", "2", "[0, 1]"],
        ),
        ({"backend": "cuda"}, ["backend", "'cuda'"]),
        ({"mask": None}, ["mask", "NoneType"]),
        ({"advantages": [0.0, 1.0]}, ["advantages", "list"]),
        ({"average": "sequence", "cu_seqlens": [0, 2]}, ["cu_seqlens", "list"]),
        ({"mask": torch.ones(2, dtype=torch.complex64)}, ["mask", "torch.complex64"]),
        ({"clip_low": None}, ["clip_low", "None"]),
        ({"kl_beta": math.inf}, ["kl_beta", "inf"]),
        ({"entropy": torch.zeros(2), "entropy_coef": math.nan}, ["entropy_coef", "nan"]),
        ({"denominator": torch.ones(2, 1)}, ["denominator", "(2, 1)"]),
        ({"denominator": math.inf}, ["denominator", "inf"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, shows):
    x = torch.zeros(2)
    arguments = {
        "logprobs": x,
        "old_logprobs": x,
        "ref_logprobs": x,
        "advantages": x,
        "mask": torch.ones(2),
    }
    with raised(ValueError, *shows):
        policy_loss(**{**arguments, **change})
