"""The settings of `rl` that reach a step's loss and its token advantages on the trainer ranks.

`RLConfig` makes `LossSettings` and `TokenAdvantageSettings`; `trainer.operations` carries them as
mappings of their names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from megatron_r1.config.algorithms import Option
from megatron_r1.config.engine_mask import EngineMaskSettings

AdvantageStd = Literal["group", "batch", "none"]
KLEstimator = Literal["k1", "k2", "k3", "unbiased"]
LossAverage = Literal["sequence", "token", "constant"]
RatioLevel = Literal["token", "sequence"]


class _Readable:
    """Settings that user code written before 0.3 can still read as a mapping.

    Losses and token advantages that users wrote for 0.2 read settings["kl_beta"], which the
    changelog of 0.3 promises to work, and call ours with {**settings, "discount": 0.5}. Nothing
    else needs this class: it can go, and `of` with it, in a version that takes the promise back."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def keys(self) -> Iterable[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]

    @classmethod
    def of(cls, settings: Self | Mapping[str, Any]) -> Self:
        """Return settings as they are, or made from a user's mapping of their names."""
        return settings if isinstance(settings, cls) else cls(**settings)


@dataclass(frozen=True)
class LossSettings(_Readable):
    """Settings of a policy loss: those of r1_kernels' `policy_loss` (formulae: its `policy_terms`).

    `loss_average` also chooses the trainer's denominator, unlike `average` in `policy_loss`. The
    default of each optional term leaves that term out."""

    loss_average: LossAverage
    """as `rl.loss_average`; `trainer.losses` has what each is divided by"""
    clip_low: float
    """ε below 1 at which ρ is clipped"""
    clip_high: float
    """ε above 1 at which ρ is clipped"""
    max_response_tokens: int | None = None
    """L, the tokens that loss_average "constant" divides by; None: for the other averages"""
    objective: Literal["ppo", "cispo"] = "ppo"
    """the objective per token, of `OBJECTIVES` in r1_kernels' `policy_terms`"""
    dual_clip: float | None = None
    """largest ρ of a negative advantage"""
    ratio_level: RatioLevel = "token"
    """sequence: one ρ per response"""
    importance_cap: float | None = None
    """largest weight of a token by π_old over the engine's policy; None: tokens are not weighed"""
    kl_beta: float = 0.0
    """β, the weight of the KL estimate in the loss; 0 where the penalty is in the reward"""
    kl_estimator: KLEstimator = "k3"
    """the estimator of the KL to the reference, as `rl.kl_estimator`"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    options: dict[str, Option] = field(default_factory=dict)
    """`rl.options`"""
    engine_mask: EngineMaskSettings = EngineMaskSettings()
    """the mask; the loss applies only the method "divergence", others change the advantages"""
    inner: tuple[str, ...] = ()
    """"module:function" of the losses within that of a correction, the algorithm's last"""


@dataclass(frozen=True)
class TokenAdvantageSettings(_Readable):
    """Settings of an algorithm's token advantages, with the names and meanings of `rl`."""

    kl_beta: float
    """β, the weight of the penalty -log(π_old / π_ref) in a token's reward"""
    discount: float
    """γ"""
    gae_lambda: float
    """λ"""
    advantage_std: AdvantageStd
    """what advantages are divided by, as `rl.advantage_std`"""
    advantage_epsilon: float
    """added to that divisor"""
    options: dict[str, Option] = field(default_factory=dict)
    """`rl.options`"""
