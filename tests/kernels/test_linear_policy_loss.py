"""linear_policy_loss against autograd through whole logits and the papers' formulae, in fp64."""

import inspect
import math

import formulae
import pytest
import torch
from formulae import near
from policy_loss_cases import SETTINGS, expected, whole_problem
from r1_kernels import (
    Averaging,
    PolicySettings,
    TokenTensors,
    linear_policy_loss,
    linear_policy_loss_from_settings,
    policy_loss,
)
from refusals import raised

# fp32 sums of 29 and of 37 terms of order 10, scaled by weights of order 1/10
FP32 = {"atol": 1e-5, "rtol": 1e-5}
NAMES = ["dapo, asymmetric", "dual clip", "k3", "importance", "entropy", "cispo"]
LEVELS = [
    ("token", "token"),
    ("token", "sequence"),
    ("sequence", "sequence"),
    ("sequence", "token"),
]
# Of each setting, both ratios and both averages; the other pairs cost as much.
CASES = [
    pytest.param(name, *level, marks=() if (i - j) % 2 == 0 else pytest.mark.more)
    for i, name in enumerate(NAMES)
    for j, level in enumerate(LEVELS)
]


def ours(h, w, y, p, settings, dtype=torch.float32, temperature=0.8, **options):
    settings = {"kl_beta": 0.0, **settings}
    c, d = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    q = {k: v.to(dtype) if v.is_floating_point() else v for k, v in p.items()}
    out = linear_policy_loss(
        c,
        d,
        y,
        q["old"],
        q["ref"] if settings["kl_beta"] else None,
        q["advantages"],
        q["mask"],
        temperature=temperature,
        rollout_logprobs=q["rollout"] if "importance_cap" in settings else None,
        cu_seqlens=q["cu_seqlens"],
        **settings,
        **options,
    )
    out.loss.backward()
    return out, c.grad, d.grad


@pytest.mark.first_cases(4)
@pytest.mark.parametrize(("name", "ratio_level", "average"), CASES)
def test_loss_metrics_and_gradients_match_fp64_autograd(backend, name, ratio_level, average):
    problem, settings = whole_problem(), SETTINGS[name]
    levels = {"ratio_level": ratio_level, "average": average}
    loss, new, entropy, grad_hidden, grad_weight = expected(*problem, settings, **levels)
    seen = problem[3]["mask"] > 0
    for chunk in (4, None):
        out, got_hidden, got_weight = ours(
            *problem, settings, chunk_tokens=chunk, backend=backend, **levels
        )
        with_chunk = {**FP32, "chunk": chunk}
        near(out.loss, loss, **with_chunk, of="loss")
        near(got_hidden, grad_hidden, **with_chunk, of="gradient of hidden")
        near(got_weight, grad_weight, **with_chunk, of="gradient of weight")
        near(out.logprobs[seen], new[seen], **with_chunk, of="log-probabilities")
        near(out.entropy[seen], entropy[seen], **with_chunk, of="entropy")
        if ratio_level == "token":
            ratio = (new - problem[3]["old"]).exp()
            near(out.ratio[seen], ratio[seen], **with_chunk, of="ratio")
        assert all(metric[~seen].abs().max() == 0 for metric in out[1:]), chunk


@pytest.mark.more
@pytest.mark.parametrize("name", ["dual clip", "k3", "entropy"])
def test_gradcheck(name):
    h, w, y, p = whole_problem(tokens=6, vocab=5)
    settings = {"kl_beta": 0.0, **SETTINGS[name]}
    ref = p["ref"] if settings["kl_beta"] else None

    def loss(a, b):
        tokens = (y, p["old"], ref, p["advantages"], p["mask"])
        return linear_policy_loss(
            a, b, *tokens, temperature=0.8, chunk_tokens=2, backend="torch", **settings
        ).loss

    assert torch.autograd.gradcheck(loss, (h.requires_grad_(), w.requires_grad_()))


def test_the_upstream_gradient_scales_and_can_be_asked_for_twice(backend):
    problem = whole_problem()
    _, once, weight_once = ours(*problem, SETTINGS["k3"], backend=backend)
    h, w, y, p = problem
    c, d = h.float().requires_grad_(), w.float().requires_grad_()
    args = [p[k].float() for k in ("old", "ref", "advantages", "mask")]
    out = linear_policy_loss(c, d, y, *args, temperature=0.8, backend=backend, **SETTINGS["k3"])
    for _ in range(2):
        (3 * out.loss).backward(retain_graph=True)
    torch.testing.assert_close(c.grad, 6 * once)
    torch.testing.assert_close(d.grad, 6 * weight_once)


def test_hidden_tokens_may_hold_anything_even_impossible_targets(backend):
    h, w, y, p = whole_problem()
    settings = SETTINGS["k3"]
    hidden = p["mask"] == 0
    clean, grad_hidden, grad_weight = ours(h, w, y, p, settings, backend=backend)
    for tensor in (h, p["old"], p["ref"], p["advantages"]):
        tensor[hidden] = math.nan
    y[hidden] = -100
    out, got_hidden, got_weight = ours(h, w, y, p, settings, backend=backend)
    assert out.loss.equal(clean.loss)
    assert got_hidden.equal(grad_hidden) and got_weight.equal(grad_weight)
    assert got_hidden[hidden].abs().max() == 0


def test_nan_in_a_seen_token_is_reported(backend):
    h, w, y, p = whole_problem()
    h[p["mask"].argmax()] = math.nan
    out, grad_hidden, _ = ours(h, w, y, p, SETTINGS["k3"], backend=backend)
    assert torch.isnan(out.loss) and torch.isnan(grad_hidden).any()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_nothing_seen_and_no_tokens_at_all_are_a_loss_of_zero(backend, ratio_level):
    for tokens in (5, 0):
        h = torch.full((tokens, 4), math.nan, requires_grad=True)
        w = torch.randn(9, 4, requires_grad=True)
        zeros = torch.zeros(tokens)
        out = linear_policy_loss(
            *(h, w, torch.full((tokens,), -1), zeros, zeros, zeros, zeros),
            ratio_level=ratio_level,
            cu_seqlens=torch.tensor([0, tokens]),
            backend=backend,
        )
        out.loss.backward()
        assert out.loss.item() == 0.0, tokens
        assert h.grad.abs().sum() == 0 and w.grad.abs().sum() == 0, tokens


def test_without_old_logprobs_the_gradient_is_that_of_an_on_policy_step(backend):
    h, w, y, p = whole_problem()
    new, _ = formulae.logprobs_and_entropy(h @ w.t(), y, 0.8)
    _, want, _ = ours(h, w, y, {**p, "old": new}, SETTINGS["k3"], backend=backend)
    c = h.float().requires_grad_()
    args = [p[k].float() for k in ("ref", "advantages", "mask")]
    settings = {**SETTINGS["k3"], "temperature": 0.8, "backend": backend}
    linear_policy_loss(c, w.float(), y, None, *args, **settings).loss.backward()
    torch.testing.assert_close(c.grad, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [65_535, 65_536, 65_537])
def test_64k_tokens(tokens):
    h, w, y, p = whole_problem(tokens=tokens, vocab=7)
    loss, *_, grad_hidden, grad_weight = expected(h, w, y, p, SETTINGS["k3"])
    out, got_hidden, got_weight = ours(h, w, y, p, SETTINGS["k3"], chunk_tokens=4096)
    # 64K fp32 terms of order 1, weighed by 1 / 64K
    near(out.loss, loss, **FP32, of="loss")
    near(got_hidden, grad_hidden, **FP32, of="gradient of hidden")
    near(got_weight, grad_weight, **FP32, of="gradient of weight")


@pytest.mark.more
def test_two_runs_have_the_same_bits_and_the_forward_pass_alone_too(backend):
    problem = whole_problem()
    first, second = (ours(*problem, SETTINGS["k3"], backend=backend) for _ in range(2))
    assert first[0].loss.equal(second[0].loss)
    assert first[1].equal(second[1]) and first[2].equal(second[2])
    with torch.no_grad():
        h, w, y, p = problem
        args = [p[k].float() for k in ("old", "ref", "advantages", "mask")]
        settings = {**SETTINGS["k3"], "temperature": 0.8, "backend": backend}
        alone = linear_policy_loss(h.float(), w.float(), y, *args, **settings)
    assert alone.loss.equal(first[0].loss) and not alone.loss.requires_grad


@pytest.mark.more
def test_bf16_gradients_lose_nothing_by_chunks(backend):
    h, w, y, p = whole_problem(tokens=64)
    h, w = h.bfloat16().double(), w.bfloat16().double()
    *_, grad_hidden, grad_weight = expected(h, w, y, p, SETTINGS["k3"])
    for chunk in (4, None):
        _, got_hidden, got_weight = ours(
            h, w, y, p, SETTINGS["k3"], torch.bfloat16, chunk_tokens=chunk, backend=backend
        )
        # Logits, old log-probabilities and gradients of logits are each rounded at 2^-9.
        for got, want in ((got_hidden, grad_hidden), (got_weight, grad_weight)):
            assert got.dtype == torch.bfloat16
            error = ((got.double() - want).norm() / want.norm()).item()
            assert error < 0.015, f"chunk {chunk}, {tuple(got.shape)}: {error}"


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_autocast_changes_nothing(backend, ratio_level, average):
    problem, settings = whole_problem(), SETTINGS["k3"]
    levels = {"ratio_level": ratio_level, "average": average, "backend": backend}
    plain = ours(*problem, settings, **levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ours(*problem, settings, **levels)
    assert cast[0].loss.equal(plain[0].loss)
    assert cast[1].equal(plain[1]) and cast[2].equal(plain[2])


@pytest.mark.more
def test_fp16_gradients_with_a_loss_scale(backend):
    """With weights of 1 / 65,536, a large vocabulary and the loss scale that AMP begins with."""
    scale = 65536.0
    h, w, y, p = whole_problem(tokens=40, vocab=4099)
    h, w = h.half().double(), (w / 8).half().double()
    new, _ = formulae.logprobs_and_entropy(h @ w.t(), y, 0.8)
    p = {**p, "old": new, "ref": new, "mask": torch.ones_like(new)}
    settings = {"clip_low": 0.2, "clip_high": 0.2}
    *_, want_hidden, want_weight = expected(h, w, y, p, settings)
    c, d = h.half().requires_grad_(), w.half().requires_grad_()
    old, advantages, mask = (p[name].float() for name in ("old", "advantages", "mask"))
    out = linear_policy_loss(
        c, d, y, old, None, advantages, mask,
        temperature=0.8, kl_beta=0.0, denominator=scale, chunk_tokens=16, backend=backend,
        **settings,
    )  # fmt: skip
    (out.loss * scale).backward()
    # The oracle's loss is the mean over the 40 tokens.
    for got, want in ((c.grad, want_hidden * 40), (d.grad, want_weight * 40)):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 0.002, f"{tuple(got.shape)}: {error}"


@pytest.mark.parametrize(
    ("change", "shows"),
    [
        ({"weight": torch.zeros(7, 2)}, ["hidden", "weight"]),
        ({"targets": torch.full((4,), 7)}, ["targets", "7", "0", "6"]),
        ({"advantages": torch.zeros(3)}, ["advantages", "(4,)", "(3,)"]),
        ({"old_logprobs": torch.zeros(4).int()}, ["old_logprobs"]),
        ({"ref_logprobs": None}, ["kl_beta", "0.001", "ref_logprobs"]),
        ({"mask": torch.ones(4, device="meta")}, ["mask", "meta", "hidden"]),
        ({"average": "sequence"}, ["average", "sequence", "cu_seqlens"]),
        ({"chunk_tokens": -1}, ["chunk_tokens", "-1"]),
        ({"chunk_tokens": 2.5}, ["chunk_tokens", "2.5"]),
        ({"vocab_size": 7.0}, ["vocab_size", "7.0"]),
        ({"temperature": torch.ones(())}, ["temperature"]),
        ({"entropy_coef": math.nan}, ["entropy_coef", "nan"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, shows):
    x = torch.zeros(4)
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "targets": torch.zeros(4).long(),
        "old_logprobs": x,
        "ref_logprobs": x,
        "advantages": x,
        "mask": torch.ones(4),
    }
    with raised(ValueError, *shows):
        linear_policy_loss(**{**arguments, **change})


@pytest.mark.parametrize("function", [linear_policy_loss, policy_loss])
def test_settings_and_averaging_have_the_defaults_of_the_keywords(function):
    parameters = inspect.signature(function).parameters
    for defaults in (PolicySettings._field_defaults, Averaging._field_defaults):
        assert {name: parameters[name].default for name in defaults} == defaults


@pytest.mark.more
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_objects_give_what_keywords_do(backend, level):
    h, w, y, p = whole_problem()
    settings = {**SETTINGS["k3"], "entropy_coef": 0.07, "importance_cap": 1.1}
    levels = {"ratio_level": level, "average": level}
    want, *want_gradients = ours(h, w, y, p, settings, backend=backend, **levels)
    c, d = h.float().requires_grad_(), w.float().requires_grad_()
    q = {k: v.float() if v.is_floating_point() else v for k, v in p.items()}
    out = linear_policy_loss_from_settings(
        c,
        d,
        y,
        TokenTensors(None, q["old"], q["ref"], q["rollout"], q["advantages"], q["mask"]),
        PolicySettings(**settings),
        Averaging(**levels, cu_seqlens=q["cu_seqlens"]),
        temperature=0.8,
        backend=backend,
    )
    out.loss.backward()
    for got, expected_tensor in zip((*out, c.grad, d.grad), (*want, *want_gradients), strict=True):
        assert torch.equal(got, expected_tensor)


@pytest.mark.parametrize("name", ["logprobs", "log_ratio"])
def test_what_is_computed_from_hidden_states_cannot_be_given(name):
    h, w, y = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4).long()
    tokens = TokenTensors(None, y.float(), None, None, y.float(), torch.ones(4))
    with raised(ValueError, name):
        linear_policy_loss_from_settings(
            h, w, y, tokens._replace(**{name: torch.ones(4)}), PolicySettings(), Averaging()
        )
