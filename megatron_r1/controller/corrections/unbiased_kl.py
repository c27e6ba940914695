"""`rl.kl_estimator: unbiased`: the estimate of KL times the ratio of the policies (DeepSeek-V3.2,
arXiv 2512.02556, section 3.1, eq. 7).

    KL_t = ρ_t (e^g - g - 1),  g = log(π_ref / π_θ), ρ_t = π_θ / π_old of token t

Its gradient is -ρ_t g ∇ log π_θ, whose expectation over tokens that π_old has sampled is the
gradient of KL(π_θ ‖ π_ref), in every mini-batch of a rollout. k3 alone has the factor 1 - e^g,
without a bound where the reference finds a token far more probable than the policy. At ρ = 1 the
gradient is k2's.

ρ is the token's also where `rl.ratio_level` is sequence, it is not clipped, and the engine's
probability does not enter. The policy loss knows k1 to k3 only, so that the term is added to it
from log-probabilities of their own: four products of the head more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.corrections import call_inner_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.loss_head import LossHead
    from megatron_r1.trainer.losses import LossSum


def loss(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> LossSum:
    """Return the algorithm's loss with this KL term in place of its own.

    The term is averaged as `loss_average` says, which an algorithm's own loss has to do as well.

    Args:
        batch: the packed samples, with logprobs["ref"].
        head: the model's output layer.
        settings: the settings of the algorithm's loss, with the weight of the term."""
    from r1_kernels.policy_terms import MAX_LOG_RATIO

    from megatron_r1.trainer.metrics import Mean

    settings = LossSettings.of(settings)
    settings_without_kl = replace(settings, kl_beta=0.0, kl_estimator="k3")
    loss_sum = call_inner_loss(batch, head, settings_without_kl)
    rows = batch.response_positions
    logprobs = head.logprobs()[0][rows].double()
    old_logprobs = batch.logprobs["old"][rows].double()
    ref_logprobs = batch.logprobs["ref"][rows].double()
    ratio = (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    g = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    kl = ratio * (g.expm1() - g)
    weights = _weights_in_sum(batch, head, settings)[rows]
    total_loss = loss_sum.loss + (settings.kl_beta * (weights * kl).sum()).to(loss_sum.loss.dtype)
    metrics = {
        "loss": Mean(total_loss.detach(), loss_sum.denominator),
        "kl": Mean(kl.detach().sum(), batch.is_response.sum()),
    }
    return loss_sum._replace(loss=total_loss, metrics={**loss_sum.metrics, **metrics})


def _weights_in_sum(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> Tensor:
    """Return (T,) fp64, what a response token weighs in the sum."""
    from megatron_r1.trainer.losses import make_token_averaging
    from megatron_r1.trainer.whole_microbatch import WholeMicrobatch

    token_averaging = make_token_averaging(
        batch, settings.loss_average, settings.max_response_tokens
    )
    if token_averaging.average == "token":
        return token_averaging.response_weights.double() / token_averaging.denominator
    microbatch = WholeMicrobatch(batch, head.context_group)
    return microbatch.local_part(1 / microbatch.response_lengths.clamp(min=1))
