"""The settings of a step that reach its loss and its token advantages on the trainer ranks.

`RLConfig` makes both; `training.wire` carries them as mappings of these names."""

from dataclasses import dataclass
from typing import Literal

AdvantageStd = Literal["group", "batch", "none"]
KLEstimator = Literal["k1", "k2", "k3"]
LossAverage = Literal["sequence", "token", "constant"]
RatioLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class LossSettings:
    """Settings of a policy loss: those of r1_kernels' `policy_loss` (formulae: its `policy_terms`),
    but for `average`, by which the trainer's denominator is chosen too. The defaults of optional
    terms leave the term out."""

    average: LossAverage
    """as `rl.loss_average`; `training.losses` has what each is divided by"""
    clip_low: float
    """ε below 1 at which ρ is clipped"""
    clip_high: float
    """ε above 1 at which ρ is clipped"""
    max_response_tokens: int | None = None
    """L, the tokens that average "constant" divides by; None: for the other averages"""
    objective: Literal["ppo", "cispo"] = "ppo"
    dual_clip: float | None = None
    """largest ρ of a negative advantage"""
    ratio_level: RatioLevel = "token"
    """sequence: one ρ per response"""
    importance_cap: float | None = None
    """largest weight of a token by π_old over the engine's policy; None: tokens are not weighed"""
    kl_beta: float = 0.0
    """β, the weight of the KL estimate in the loss; 0 where the penalty is in the reward"""
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""


@dataclass(frozen=True)
class TokenSettings:
    """Settings of an algorithm's token advantages, with the names and meanings of `rl`."""

    kl_beta: float
    """β, the weight of the penalty -log(π_old / π_ref) in a token's reward"""
    discount: float
    """γ"""
    gae_lambda: float
    """λ"""
    advantage_std: AdvantageStd
    advantage_epsilon: float
