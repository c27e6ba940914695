"""GRPO: group relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1;
DeepSeek-R1, arXiv 2501.12948, eq. 1-3).

    A_i = (r_i - mean(r)) / (std(r) + ε), over the G responses to one prompt; all tokens have it
    J   = 1/N Σ_i 1/|o_i| Σ_t [ min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i) - β KL(π_θ ‖ π_ref) ]

with ρ = π_θ / π_old of token t; there is no critic. Advantages are normalized per group, the loss
per sequence: the mean over a response's tokens, then over responses. KL is in the loss, never in
the reward, and `kl_estimator` chooses its estimate. ρ, the clip and the estimators k1, k2 and k3
are defined in `r1_kernels.policy_terms`; in plain PyTorch they are `primitives/policy_torch.py`.
Masked: prompts, and what follows the end of a response. `advantage_std` batch divides by the
standard deviation of the rollout instead of the group's. The defaults of `rl` are R1-Zero's, so
GRPO sets none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.config import RLConfig
from megatron_r1.config.losses import LossSettings
from megatron_r1.controller.advantages import group_advantages, over_batch_std

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedBatch
    from megatron_r1.trainer.head import Head
    from megatron_r1.trainer.losses import LossTerms


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return A_i, one per response, normalized by `rl.advantage_std`; ε is `advantage_epsilon`.

    Args:
        groups: the rewards of a rollout, a list per group; None for an ungraded response.
        rl: the settings of `rl`.

    Returns:
        A list per group; 0 for an ungraded response, and for a whole group whose rewards are
        equal."""
    by = "group" if rl.advantage_std == "group" else "none"
    by_group = [group_advantages(g, divide_by=by, epsilon=rl.advantage_epsilon) for g in groups]
    if rl.advantage_std == "batch":
        return over_batch_std(by_group, groups, rl.advantage_epsilon)
    return by_group


def loss(batch: PackedBatch, head: Head, settings: LossSettings) -> LossTerms:
    """Return -J for the advantages in `batch`, as a sum over response tokens and its denominator.

    The denominator is N with `average` sequence (each response's terms are divided by |o_i| first),
    Σ_i |o_i| with token, N with constant (they are divided by L first).

    Args:
        batch: the micro-batch. Its logprobs["ref"] is read if kl_beta > 0, and ["old"]; without
            "old" the policy itself is taken for π_old (ratio 1).
        head: the hidden states of the batch.
        settings: with importance_cap None the difference between the engine's and the trainer's
            log-probabilities is not corrected."""
    from megatron_r1.trainer.losses import LossTerms, denominator, token_weights
    from megatron_r1.trainer.metrics import Maximum, Mean

    settings = LossSettings.of(settings)
    is_corrected = settings.importance_cap is not None
    terms = head.policy_loss(
        objective=settings.objective,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        ratio_level=settings.ratio_level,
        rollout_logprobs=batch.rollout_logprobs if is_corrected else None,
        importance_cap=settings.importance_cap,
        kl_beta=settings.kl_beta,
        kl_estimator=settings.kl_estimator,
        entropy_coef=settings.entropy_coef,
        **token_weights(batch, settings.average, settings.max_response_tokens),
    )
    count = denominator(batch, settings.average)
    num_tokens = batch.is_response.sum()
    metrics: dict[str, Mean | Maximum] = {
        "ratio/max": Maximum(terms.ratio.amax()),
        "loss": Mean(terms.loss.detach(), count),
        "kl": Mean(terms.kl.sum(), num_tokens),
        "clip_fraction": Mean(terms.clipped.sum(), num_tokens),
        "entropy": Mean(terms.entropy.sum(), num_tokens),
    }
    if is_corrected:
        metrics["importance"] = Mean(terms.importance.sum(), num_tokens)
    return LossTerms(terms.loss, count, metrics)
