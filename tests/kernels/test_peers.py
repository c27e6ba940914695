"""The losses of TRL's GRPOTrainer, of Liger's fused kernels and of verl are ours: values and
gradients of hidden states and output layer. Needs `make test-packages`."""

import importlib
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import formulae
import pytest
import torch
from formulae import near
from r1_kernels import linear_policy_loss, linear_token_logprobs

pytestmark = [pytest.mark.more, pytest.mark.filterwarnings("ignore")]
VERL = Path(__file__).parents[2] / "build/verl"
NOT_INSTALLED = "make test-packages"

ROWS, LENGTH, CAP = 5, 11, 1.5
LOW, HIGH, BETA, TEMPERATURE = 0.2, 0.28, 0.3, 0.8
TOKENS = ROWS * LENGTH
# Ours, then TRL's, which Liger's arguments are named after.
CASES = {
    "grpo": ({"average": "sequence"}, {"loss_type": "grpo"}),
    "bnpo": ({}, {"loss_type": "bnpo"}),
    "dapo": ({"denominator": 70.0}, {"loss_type": "dapo"}),
    "dr_grpo": ({"denominator": 40.0 * ROWS}, {"loss_type": "dr_grpo"}),
    "gspo": (
        {"average": "sequence", "ratio_level": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    # TRL's bound is of the ratio, ours of its distance from 1; it has no lower one.
    "cispo": (
        {"objective": "cispo", "clip_low": 10.0, "denominator": 70.0},
        {"loss_type": "cispo", "epsilon_high": 1 + HIGH},
    ),
    "two-sided": ({"dual_clip": 1.4}, {"loss_type": "bnpo", "delta": 1.4}),
    "no reference": ({"kl_beta": 0.0}, {"loss_type": "bnpo", "beta": 0.0}),
}
CISPO = {"clip_ratio_low": 10.0}
"""verl bounds the ratio below too, here at less than 0."""


@pytest.fixture(scope="module")
def batch():
    """Five padded responses, fp64: old, reference and rollout policies near the present one."""
    hidden, weight, targets = formulae.problem(TOKENS, spread=0.3)
    g = torch.Generator().manual_seed(1)
    new, _ = formulae.logprobs_and_entropy(hidden @ weight.t(), targets, TEMPERATURE)
    near_new = [new + 0.4 * torch.randn(TOKENS, generator=g, dtype=new.dtype) for _ in range(3)]
    old, reference, rollout = near_new
    lengths = torch.tensor([LENGTH, 1, 4, 7, LENGTH])
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        targets=targets,
        old=old,
        reference=reference,
        rollout=rollout,
        advantages=torch.tensor([1.0, -0.5, 0.7, -1.2, 0.1], dtype=new.dtype),
        mask=(torch.arange(LENGTH) < lengths[:, None]).long(),
        cu_seqlens=torch.arange(0, TOKENS + 1, LENGTH),
    )


def rows(tensor):
    return tensor.view(ROWS, LENGTH, *tensor.shape[1:])


def ratios(batch):
    """How much more likely tokens are to the trainer than to the engine, limited."""
    return rows((batch.old - batch.rollout).exp().clamp(max=CAP))


def loss_and_gradients(batch, dtype, compute):
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (batch.hidden, batch.weight))
    loss = compute(hidden, weight)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def ours(batch, dtype, options, corrects, entropy_coef=0.0):
    options = {"clip_low": LOW, "clip_high": HIGH, "kl_beta": BETA} | options
    tokens = [t.to(dtype) for t in (batch.old, batch.reference)]
    tokens += [batch.advantages.repeat_interleave(LENGTH).to(dtype), batch.mask.flatten()]

    def compute(hidden, weight):
        return linear_policy_loss(
            hidden,
            weight,
            batch.targets,
            *tokens,
            rollout_logprobs=batch.rollout.to(dtype) if corrects else None,
            importance_cap=CAP,
            temperature=TEMPERATURE,
            entropy_coef=entropy_coef,
            cu_seqlens=batch.cu_seqlens,
            **options,
        ).loss

    return loss_and_gradients(batch, dtype, compute)


def trl(batch, options, corrects, entropy_coef=0.0):
    """GRPOTrainer's own method, on a stand-in for the trainer."""
    trainer_class = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason=NOT_INSTALLED
    ).GRPOTrainer
    settings = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": BETA,
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "delta": None,
    } | options
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1).long(),
        "prompt_mask": torch.ones(ROWS, 1).long(),
        "completion_ids": rows(batch.targets),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": rows(batch.old),
        "ref_per_token_logps": rows(batch.reference),
        "importance_sampling_ratio": ratios(batch),
        "num_items_in_batch": torch.tensor(70.0),
    }

    def compute(hidden, weight):
        found = formulae.logprobs_and_entropy(hidden @ weight.t(), batch.targets, TEMPERATURE)
        trainer = SimpleNamespace(
            **settings,
            args=SimpleNamespace(
                delta=settings["delta"], use_bias_correction_kl=False, steps_per_generation=1
            ),
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
                sync_gradients=True,
            ),
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            use_vllm=corrects,
            vllm_importance_sampling_correction=corrects,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            max_completion_length=40,
            aux_loss_enabled=False,
            use_adaptive_entropy=False,
            entropy_coef=entropy_coef,
            _entropy_bonus_enabled=bool(entropy_coef),
            _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *args, **kw: (*map(rows, found), None),
        )  # fmt: skip
        return trainer_class._compute_loss(trainer, None, inputs)

    return loss_and_gradients(batch, torch.float64, compute)


def liger(batch, options, corrects):
    """LigerFusedLinearGRPOLoss, which computes in fp32."""
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason=NOT_INSTALLED)
    settings = {"beta": BETA, "epsilon_low": LOW, "epsilon_high": HIGH} | options
    loss_of = module.LigerFusedLinearGRPOLoss(
        compiled=False, temperature=TEMPERATURE, max_completion_length=40, **settings
    )
    old, reference, ratio = (
        t.float() for t in (rows(batch.old), rows(batch.reference), ratios(batch))
    )

    def compute(hidden, weight):
        loss, _ = loss_of(
            rows(hidden),
            weight,
            rows(batch.targets),
            batch.mask,
            batch.advantages.float(),
            ref_per_token_logps=reference,
            old_per_token_logps=old,
            vllm_is_ratio=ratio if corrects else None,
            num_items_in_batch=torch.tensor(70.0),
        )
        return loss

    return loss_and_gradients(batch, torch.float32, compute)


@pytest.fixture
def verl(monkeypatch):
    """verl's losses and its workers' configurations."""
    if not (VERL / "verl").exists():
        pytest.skip(NOT_INSTALLED)
    # At the end: what both folders have is taken from the environment.
    monkeypatch.setattr(sys, "path", [*sys.path, str(VERL)])
    # They import Ray, 75 MB, for what other parts of verl do with it.
    monkeypatch.setitem(sys.modules, "ray", MagicMock())
    names = "verl.trainer.ppo.core_algos", "verl.workers.config"
    return [importlib.import_module(name) for name in names]


def loss_of_verl(modules, batch, loss_name, mode, settings):
    """verl's loss of the actor, and its k3, averaged as `mode` says."""
    core, workers = modules
    clip = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": 3.0} | settings
    config = workers.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clip)
    advantages = batch.advantages[:, None].expand(ROWS, LENGTH)

    def compute(hidden, weight):
        found, _ = formulae.logprobs_and_entropy(hidden @ weight.t(), batch.targets, TEMPERATURE)
        new, mask = rows(found), batch.mask
        loss_of = core.get_policy_loss_fn(loss_name)
        loss, _ = loss_of(rows(batch.old), new, advantages, mask, mode, config)
        k3 = core.kl_penalty(new, rows(batch.reference), "k3")
        return loss + BETA * core.agg_loss(k3, mask, mode)

    return loss_and_gradients(batch, torch.float64, compute)


def compare(found, wanted, tolerance, **parameters):
    for got, want, of in zip(found, wanted, ("loss", "hidden", "weight"), strict=True):
        near(got, want, atol=tolerance, rtol=tolerance, of=of, **parameters)


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_trl_s_trainer_computes_our_loss(batch, name, corrects):
    our_options, options = CASES[name]
    wanted = trl(batch, options, corrects)
    # fp64
    compare(ours(batch, torch.float64, our_options, corrects), wanted, 1e-12, case=name)
    # fp32 sums of 29 terms of order 10
    compare(ours(batch, torch.float32, our_options, corrects), wanted, 2e-5, case=name)


def test_trl_s_entropy_bonus_is_ours(batch):
    wanted = trl(batch, {"loss_type": "bnpo"}, False, entropy_coef=0.07)
    compare(ours(batch, torch.float64, {}, False, entropy_coef=0.07), wanted, 1e-12)


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_liger_s_fused_loss_is_ours(batch, name, corrects):
    our_options, options = CASES[name]
    wanted = ours(batch, torch.float64, our_options, corrects)
    compare(liger(batch, options, corrects), wanted, 2e-5, case=name)


@pytest.mark.parametrize(
    ("our_options", "name", "mode", "settings", "tolerance"),
    [
        ({"dual_clip": 3.0}, "vanilla", "token-mean", {}, 1e-12),
        ({"objective": "cispo", "clip_low": 10.0}, "cispo", "token-mean", CISPO, 1e-12),
        # It divides a response's sum by its tokens + 1e-8.
        (CASES["gspo"][0], "gspo", "seq-mean-token-mean", {}, 1e-6),
    ],
)
def test_verl_s_losses_are_ours(verl, batch, our_options, name, mode, settings, tolerance):
    wanted = loss_of_verl(verl, batch, name, mode, settings)
    compare(ours(batch, torch.float64, our_options, False), wanted, tolerance, case=name)


@pytest.mark.parametrize("peer", ["trl.kernels", "liger_kernel.ops"])
def test_logprobs_and_entropy_are_those_of_their_fused_heads(batch, peer):
    module = pytest.importorskip(peer, reason=NOT_INSTALLED)
    up, up_entropy = torch.randn(2, TOKENS)

    def theirs(hidden, weight):
        if peer == "trl.kernels":
            settings = TEMPERATURE, 8, None, 1.0, ("entropy",)
            found = module.ChunkedLogProbFunction.apply(
                hidden, weight, None, batch.targets, *settings
            )
            return found[0] @ up + found[1] @ up_entropy
        losses, entropy = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, batch.targets, TEMPERATURE, return_entropy=True
        )
        return entropy @ up_entropy - losses @ up

    def our_own(hidden, weight):
        logprobs, entropy = linear_token_logprobs(
            hidden, weight, batch.targets, temperature=TEMPERATURE
        )
        return logprobs @ up.to(logprobs) + entropy @ up_entropy.to(logprobs)

    wanted = loss_and_gradients(batch, torch.float64, our_own)
    compare(loss_and_gradients(batch, torch.float32, theirs), wanted, 1e-4, peer=peer)
    compare(loss_and_gradients(batch, torch.float32, our_own), wanted, 1e-4, peer=peer)
