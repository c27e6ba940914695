"""GRPO: group relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1;
DeepSeek-R1, arXiv 2501.12948, eq. 1-3).

    A_i = (r_i - mean(r)) / (std(r) + ε), over the G responses to one prompt; all tokens have it
    J   = 1/N Σ_i 1/|o_i| Σ_t [ v min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i)
                                - β KL(π_θ ‖ π_ref) + c H ]

with ρ = π_θ / π_old of token t; there is no critic. The papers have v = 1 (`importance_cap` None;
else π_old over the engine's policy, at most the cap) and c = 0 (`entropy_coef`, of the entropy H).
Advantages are normalized per group, the loss per sequence: the mean over a response's tokens, then
over responses. KL is in the loss, never in the reward, and `kl_estimator` chooses its estimate. ρ,
the clip and the estimators k1, k2 and k3 are defined in `r1_kernels.policy_terms`; in plain PyTorch
they are `primitives/policy_torch.py`. Masked: prompts, and what follows the end of a response.
`advantage_std` batch divides by the standard deviation of the rollout instead of the group's. The
defaults of `rl` are R1-Zero's, so GRPO sets none of its own.

The paragraphs below `VARIANTS` have DAPO, Dr. GRPO and GSPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_r1.config import RLConfig
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.advantages import divide_by_batch_std, group_advantages

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.loss_head import LossHead
    from megatron_r1.trainer.losses import LossSum


VARIANTS = ("dapo", "dr_grpo", "gspo")
"""DAPO, Dr. GRPO and GSPO are GRPO's advantages and loss, each with settings of its own.

They have no code here, because every difference is a setting that any algorithm may take: their
values are in `config/algorithms.py`, and the functions that read them are named below.

DAPO: decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476, eq. 8).

    J = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

ε_high is above ε_low, so that unlikely tokens may grow (section 3.1); equal-reward groups are
replaced (setting `dynamic_sampling`, section 3.2; `dynamic_sampling.collect_dynamic_rollout`); the
average is per token, so that tokens of long responses weigh as much as others (`loss_average`,
section 3.3; `losses.loss_denominator`); a soft penalty of responses near the length limit
(`overlong_buffer`, section 3.4, 4,096 of 20,480 tokens;
`corrections.overlong_penalty`). No KL.

Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3.2).

    A_i = r_i - mean(r), over the G responses to one prompt
    J   = 1/(N L) Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i),  L a constant: max_response_tokens

Dividing by the standard deviation gives prompts that are nearly all right or all wrong more weight
(`advantage_std` none: `advantages.group_advantages`), and averaging per sequence, 1/|o_i|, makes
long wrong responses cheap (`loss_average` constant: `losses.loss_denominator`). No KL.

GSPO: group sequence policy optimization (arXiv 2507.18071, eq. 5-7).

    s_i = (π_θ(o_i) / π_old(o_i))^(1/|o_i|)
    J   = 1/N Σ_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

The ratio belongs to the whole response, as its reward does (`ratio_level` sequence:
`r1_kernels.policy_loss`); it is the geometric mean of the tokens' ratios, so that responses of
different lengths compare. Averaged per sequence. The ratio moves much less than a token's, hence
the small clips (section 5.1, with four mini-batches per rollout). After an update some tokens take
other experts, which upsets token ratios but hardly moves this one."""


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return A_i, one per response, normalized by `rl.advantage_std`; ε is `advantage_epsilon`.

    Args:
        groups: the rewards of a rollout, a list per group; None for an ungraded response.
        rl: the settings of `rl`.

    Returns:
        A list per group; 0 for an ungraded response, and for a whole group whose rewards are
        equal."""
    advantage_std: Literal["group", "none"] = "group" if rl.advantage_std == "group" else "none"
    by_group = [
        group_advantages(g, advantage_std=advantage_std, epsilon=rl.advantage_epsilon)
        for g in groups
    ]
    if rl.advantage_std == "batch":
        return divide_by_batch_std(by_group, groups, rl.advantage_epsilon)
    return by_group


def loss(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> LossSum:
    """Return -J for the advantages in `batch`, as a sum over response tokens and its denominator.

    The denominator is N with `loss_average` sequence (each response's terms are divided by |o_i|
    first), Σ_i |o_i| with token, N with constant (they are divided by L first).

    Args:
        batch: the micro-batch. Its logprobs["ref"] is read if kl_beta > 0, and ["old"]; without
            "old" the policy itself is taken for π_old (ratio 1).
        head: the hidden states of the batch.
        settings: with importance_cap None the difference between the engine's and the trainer's
            log-probabilities is not corrected."""
    from r1_kernels import PolicySettings

    from megatron_r1.trainer.losses import LossSum, loss_denominator, make_token_averaging
    from megatron_r1.trainer.metrics import Maximum, Mean

    settings = LossSettings.of(settings)
    assert settings.kl_estimator != "unbiased", "corrections.unbiased_kl adds that term itself"
    policy_settings = PolicySettings(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        kl_beta=settings.kl_beta,
        kl_estimator=settings.kl_estimator,
        importance_cap=settings.importance_cap,
        objective=settings.objective,
        entropy_coef=settings.entropy_coef,
    )
    token_averaging = make_token_averaging(
        batch, settings.loss_average, settings.max_response_tokens
    )
    terms = head.policy_loss(policy_settings, token_averaging, settings.ratio_level)
    count = loss_denominator(batch, settings.loss_average)
    num_tokens = batch.is_response.sum()
    metrics: dict[str, Mean | Maximum] = {
        "ratio/max": Maximum(terms.ratio.amax()),
        "loss": Mean(terms.loss.detach(), count),
        "kl": Mean(terms.kl.sum(), num_tokens),
        "clip_fraction": Mean(terms.clipped.sum(), num_tokens),
        "entropy": Mean(terms.entropy.sum(), num_tokens),
    }
    if settings.importance_cap is not None:
        metrics["importance"] = Mean(terms.importance.sum(), num_tokens)
    return LossSum(terms.loss, count, metrics)
