"""The policy loss of one token and its derivative, which both sets of primitives compute.

With x = logprob - old_logprob and ρ = e^x, the objective "ppo" (PPO, arXiv 1707.06347 eq. 7; GRPO,
arXiv 2402.03300 eq. 3; DeepSeek-R1, arXiv 2501.12948 eq. 1-2):

    surrogate = min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A)
    surrogate = max(surrogate, dual_clip A)            where A < 0 (Dual-clip PPO, 1912.09729 eq. 3)
    loss      = w (-v surrogate + kl_beta KL)

and the objective "cispo" (MiniMax-M1, arXiv 2506.13585 section 3.1), where the clipped ratio is a
constant and no token loses its gradient:

    surrogate = stop_gradient(clip(ρ, 1 - clip_low, 1 + clip_high)) A logprob

    v  = min(e^(old_logprob - rollout_logprob), importance_cap): the trainer's policy over the
         engine's, truncated, a constant
    KL = k1: -g    k2: g² / 2    k3: e^g - g - 1, with g = ref_logprob - logprob
         (http://joschu.net/blog/kl-approx.html; R1 uses k3)

Exponents are capped at MAX_LOG_RATIO; beyond it the derivatives of ppo's surrogate and of k3 are 0,
as that of a minimum is. (cispo's is the clipped ratio times A, whatever the exponent.) A token with
weight w = 0 is masked: it does not count, even if its tensors hold NaN. A token is unmasked where
its weight is above 0, or NaN."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from r1_kernels.arguments import check_finite, check_number

MAX_LOG_RATIO = 20.0
"""e^20 ≈ 5e8 is far beyond any clip, and its square still fits in fp32."""

KLEstimator = Literal["k1", "k2", "k3"]
Objective = Literal["ppo", "cispo"]
KL_ESTIMATORS = get_args(KLEstimator)
OBJECTIVES = get_args(Objective)


class PolicySettings(NamedTuple):
    """Settings of the module's formulae, with DeepSeek-R1's as defaults; None disables a term.

    The losses' keywords have these defaults.

    Attributes:
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage.
        kl_beta: the weight of the KL estimate.
        kl_estimator: "k1", "k2" or "k3".
        importance_cap: the largest weight v; None: v = 1; inf: no limit.
        objective: "ppo" or "cispo".
        entropy_coef: the weight of a bonus of the entropy, which the losses add to these terms."""

    clip_low: float = 10.0
    clip_high: float = 10.0
    dual_clip: float | None = None
    kl_beta: float = 0.001
    kl_estimator: KLEstimator = "k3"
    importance_cap: float | None = None
    objective: Objective = "ppo"
    entropy_coef: float = 0.0

    def check(self, ref_logprobs: Tensor | None, rollout_logprobs: Tensor | None) -> None:
        """Raise ValueError for an invalid value, and for tensors that contradict the settings.

        Args:
            ref_logprobs: the caller's.
            rollout_logprobs: the caller's."""
        for name in ("clip_low", "clip_high", "kl_beta"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number, 0 or more")
        check_finite("kl_beta", self.kl_beta)
        check_finite("entropy_coef", self.entropy_coef)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}: it must be more than 1, or None")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(
                f"importance_cap is {self.importance_cap}: it must be positive, inf for no "
                "limit, or None"
            )
        if self.importance_cap is None and rollout_logprobs is not None:
            raise ValueError(
                "importance_cap is None, which leaves tokens unweighed, but there are "
                "rollout_logprobs: give the largest weight, such as 2, or inf for no limit"
            )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator is {self.kl_estimator!r}: use k1, k2 or k3")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}: use {' or '.join(OBJECTIVES)}")
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError(
                f"dual_clip is {self.dual_clip}, but cispo clips a weight on either side already: "
                "use None"
            )
        if ref_logprobs is None and self.kl_beta:
            raise ValueError(f"kl_beta is {self.kl_beta}, but there are no ref_logprobs")


DEFAULTS = PolicySettings()


class TokenTensors(NamedTuple):
    """Inputs of the policy loss, each (T,) or None.

    Attributes:
        logprobs: nats, of the policy that is trained; None until a chunk's are computed.
        old_logprobs: nats, of the policy that the ratio compares with; None until a chunk's are
            computed.
        ref_logprobs: nats, of the reference policy.
        rollout_logprobs: nats, the engine's.
        advantages: the advantage of each token.
        weights: the caller's `mask`: what a token weighs in the average, 0 for one that is left
            out.
        log_ratio: replaces logprobs - old_logprobs where the ratio is a whole sequence's."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    log_ratio: Tensor | None = None

    def both_logprobs(self) -> tuple[Tensor, Tensor]:
        """Return logprobs and old_logprobs, which are computed by now."""
        assert self.logprobs is not None and self.old_logprobs is not None
        return self.logprobs, self.old_logprobs


class PolicyTerms(NamedTuple):
    """The terms of the loss and its gradient, computed in one pass over the tokens.

    Attributes:
        loss: (blocks,), partial sums; the other terms are (T,), 0 where the weight is 0.
        grad_log_ratio: derivative of the loss with respect to the log-ratio, 0 for cispo.
        grad_logprob: derivative with respect to the log-probability itself, of the KL term and of
            cispo's surrogate.
        ratio: exp(log-ratio), the new policy's probability over the old one's.
        clipped: 1 where the clip is active, which makes the derivative of ppo's surrogate 0; else
            0.
        kl: the KL estimate against the reference, nats; 0 without one.
        importance: the truncated weight exp(old - rollout log-probability), 1 without a correction.
    """

    loss: Tensor
    grad_log_ratio: Tensor
    grad_logprob: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    importance: Tensor
