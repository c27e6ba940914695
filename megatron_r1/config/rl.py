"""RL: the algorithm, and how its rollouts are made (`rl`).

The defaults are DeepSeek-R1-Zero's (arXiv 2501.12948 v2, section 2 and supplement B)."""

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config import algorithms
from megatron_r1.config.engine_mask import (
    BOUNDS,
    EngineMaskMethod,
    EngineMaskSettings,
    make_engine_mask_settings,
)
from megatron_r1.config.loss_settings import (
    AdvantageStd,
    KLEstimator,
    LossAverage,
    LossSettings,
    RatioLevel,
    TokenAdvantageSettings,
)
from megatron_r1.config.schedule import ScheduleEntry, check_schedule_order
from megatron_r1.config.section import Resumable, Scheduled, Section

PRESETS: dict[str, dict[str, Any]] = {
    "r1_zero": {},
    "grpo_v1": algorithms.PPO_CLIP | {"group_size": 64, "kl_beta": 0.04, "reference_refresh": 0},
}
"""Settings of this section by the name of a preset; the recipe's own settings precede them."""


class RLConfig(Section):
    """The algorithm, and how a rollout is made and cut into updates."""

    preset: Literal["r1_zero", "grpo_v1"] = "r1_zero"
    """where the values come from that a recipe leaves out"""
    algorithm: str = Field(
        "grpo",
        # No docstring below, as others have: the list of names is computed.
        description="the policy-gradient algorithm, with its own defaults for what recipe and "
        f"preset leave out: {', '.join(algorithms.ALGORITHM_NAMES)}, or your own as module:RULES. "
        "See docs/algorithms.md",
    )
    options: Scheduled[dict[str, algorithms.Option]] = {}
    """settings of an algorithm of your own, by the names in its rules"""
    group_size: Scheduled[int] = Field(16, ge=1)
    """responses per prompt, G; 2 or more where a group is the baseline"""
    prompts_per_rollout: Scheduled[int] = Field(512, gt=0)
    """prompts drawn per rollout (P); 512 x 16 = the paper's 8192 responses"""
    kind_weights: Scheduled[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = {}
    """how often prompts of a kind are drawn, relative to the largest weight, which draws all in
    each epoch; kinds left out have 1: {helpful: 0} draws none of the kind, {helpful: 0.5} half"""
    minibatches: Scheduled[int] = Field(16, gt=0)
    """optimizer steps per rollout, one inner epoch"""
    clip_low: Scheduled[float] = Field(10.0, gt=0)
    """the ratio is clipped below 1 - clip_low"""
    clip_high: Scheduled[float] = Field(10.0, gt=0)
    """the ratio is clipped above 1 + clip_high"""
    dual_clip: Scheduled[float | None] = Field(None, gt=1)
    """a negative advantage's ratio counts at most this; null: no limit"""
    ratio_level: RatioLevel = "token"
    """sequence: one ratio per response, the mean of its logarithm (GSPO)"""
    importance_cap: Scheduled[float | None] = Field(None, gt=0)
    """upper limit of each token's importance weight π_old / π_engine; null: no such weights"""
    engine_mask: Scheduled[EngineMaskMethod] = "none"
    """tokens without a policy gradient, because engine and trainer disagree: token: those with a
    ratio π_old / π_engine out of bounds (IcePop); sequence: all of a response whose geometric mean
    of it is; divergence: those whose probability has moved too far from the engine's (DPPO). See
    docs/algorithms.md"""
    engine_mask_low: Scheduled[float | None] = Field(
        None,
        ge=0,
        description="smallest ratio that is kept, of divergence the largest fall of a probability; "
        f"null: {', '.join(f'{low:g} of {name}' for name, (low, _) in BOUNDS.items())}",
    )
    engine_mask_high: Scheduled[float | None] = Field(
        None,
        gt=0,
        description="largest ratio that is kept, of divergence the largest rise of a probability; "
        f"null: {', '.join(f'{high:g} of {name}' for name, (_, high) in BOUNDS.items())}",
    )
    kl_beta: Scheduled[float] = Field(0.001, ge=0)
    """weight of the estimate of KL to the reference, in the loss; of rloo, reinforce_pp and ppo in
    the reward"""
    kl_estimator: KLEstimator = "k3"
    """estimate of KL in loss and metrics (in a reward it is k1); k3: the paper's; unbiased:
    DeepSeek-V3.2's, k3 times the ratio of the policies. k1 is a metric only: in a loss its
    expected gradient is 0"""
    entropy_coef: Scheduled[float] = Field(0.0, ge=0)
    """weight of an entropy bonus"""
    reference_refresh: Scheduled[int] = Field(400, ge=0)
    """optimizer steps between replacing the reference; 0: never"""
    staleness: int = Field(0, ge=0)
    """versions a sampled token may be behind the policy that trains on it; 0: rollout and training
    take turns, 1: one step off, more: further ahead"""
    dynamic_sampling: bool = False
    """replace groups whose responses all have the same reward (DAPO)"""
    dynamic_sampling_rounds: Scheduled[int] = Field(4, ge=1)
    """how often prompts are drawn for one rollout, before it is filled up"""
    advantage_std: AdvantageStd = "group"
    """divide by the standard deviation of the group, of the rollout, or not"""
    reward_normalization: Scheduled[Literal["sum", "each"]] = "sum"
    """what an advantage is made of: the sum of the rewards; each: every reward of rewards.weights
    is normalized alone, then they are weighed, added and normalized over the rollout (GDPO)"""
    advantage_epsilon: Scheduled[float] = Field(1e-6, ge=0)
    """added to the standard deviation"""
    loss_average: LossAverage = "sequence"
    """sequence: each response weighs the same (GRPO, eq. 1); token: each token (DAPO); constant:
    each token, over max_response_tokens per response (Dr. GRPO)"""
    discount: Scheduled[float] = Field(1.0, ge=0, le=1)
    """gamma, the discount of what follows a token (rloo, reinforce_pp, ppo,
    on_policy_distillation)"""
    gae_lambda: Scheduled[float] = Field(1.0, ge=0, le=1)
    """lambda of ppo's generalized advantages"""
    overlong_buffer: Scheduled[float] = Field(0.0, ge=0, le=1)
    """share of max_response_tokens, at its end, over which a growing penalty is taken from the
    reward (DAPO: 0.2); 0: none"""
    overlong_penalty: Scheduled[float] = Field(1.0, ge=0)
    """how large that penalty is at max_response_tokens (DAPO, eq. 13: 1)"""
    truncated: Scheduled[Literal["train", "mask"]] = "train"
    """responses that are cut off at max_response_tokens: train: they are trained on with their
    reward; mask: they are left out of loss and denominators, and count in baselines (DAPO's
    overlong filtering)"""
    routing_replay: bool = False
    """train every token through the experts the engine chose for it; a mixture of experts only. See
    docs/routing_replay.md"""
    schedule: Resumable[Annotated[list[ScheduleEntry], AfterValidator(check_schedule_order)]] = []
    """settings from a step on, [{from_step: 513, rollout.max_response_tokens: 65536}]; steps are
    rollouts. A continued run may change it. See docs/algorithms.md"""
    sample_log: Resumable[bool] = True
    """write every finished group down, so that a run that is killed does not sample it again; needs
    the disk of the steps since the oldest of the newest checkpoints (`checkpoint.keep`)"""
    keep_sample_log: Resumable[bool] = False
    """keep it of every step, for `megatron-r1 compare` and `why`; --dry-run says how large it is"""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_algorithm_and_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("algorithm", ""), str):
            return values
        name = values.get("algorithm", "grpo")
        rules = algorithms.find_rules(name)
        for key in rules.defaults.keys() - cls.model_fields.keys():
            suggestion = did_you_mean(key, cls.model_fields, "{}")
            raise UserError(
                f"rl.algorithm: {name}: its default {key} is no setting of rl{suggestion}",
                key="rl.algorithm",
                cause=Cause.UNKNOWN,
            )
        preset = values.get("preset", cls.model_fields["preset"].default)
        # A value of another type is refused later.
        preset_values = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        settings = {**rules.defaults, **preset_values, **values}
        options = values.get("options", {})
        if isinstance(options, dict):  # else refused later
            settings["options"] = rules.read_options(options)
        return settings

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> Self:
        algorithm = algorithms.find_rules(self.algorithm)
        if self.group_size < algorithm.min_group_size:
            raise UserError(
                f"rl.group_size: must be greater than or equal to {algorithm.min_group_size}, got "
                f"{self.group_size}: the group is {self.algorithm}'s baseline",
                key="rl.group_size",
                cause=Cause.OUT_OF_RANGE,
            )
        if self.advantage_std not in algorithm.advantage_stds:
            raise UserError(
                f"rl.advantage_std: {self.advantage_std} is not what {self.algorithm} does; use "
                f"{' or '.join(algorithm.advantage_stds)}, or leave it out",
                key="rl.advantage_std",
                cause=Cause.CONFLICT,
            )
        if self.kl_estimator == "k1" and self.kl_beta > 0 and not algorithm.kl_in_reward:
            raise UserError(
                "rl.kl_estimator: k1 in the loss has an expected gradient of 0, so rl.kl_beta: "
                f"{self.kl_beta:g} would hold nothing; use k2, whose gradient is that of KL(policy "
                "|| reference), or k3, the paper's",
                key="rl.kl_estimator",
                cause=Cause.CONFLICT,
            )
        if self.kl_estimator == "unbiased" and algorithm.kl_in_reward:
            raise UserError(
                f"rl.kl_estimator: unbiased is of KL in the loss, and {self.algorithm} has it in "
                "the reward, whose gradient has no bias already; leave it out",
                key="rl.kl_estimator",
                cause=Cause.CONFLICT,
            )
        if self.dual_clip is not None and not algorithm.dual_clip:
            raise UserError(
                f"rl.dual_clip: {self.dual_clip:g}: {self.algorithm} clips its weight on either "
                "side already; leave it out",
                key="rl.dual_clip",
                cause=Cause.CONFLICT,
            )
        return self

    @model_validator(mode="after")
    def _advantages_fit_the_algorithm(self) -> Self:
        algorithm = algorithms.find_rules(self.algorithm)
        if self.gae_lambda != 1 and not algorithm.critic:
            raise UserError(
                f"rl.gae_lambda: {self.gae_lambda:g}: {self.algorithm} has no critic, whose values "
                "it would weigh; leave it out, or use rl.algorithm: ppo",
                key="rl.gae_lambda",
                cause=Cause.CONFLICT,
            )
        discounts = algorithm.kl_in_reward or algorithm.critic or algorithm.teacher
        is_own = self.algorithm not in algorithms.ALGORITHMS
        if self.discount != 1 and not (discounts or is_own):
            raise UserError(
                f"rl.discount: {self.discount:g}: {self.algorithm} gives every token of a response "
                "the same advantage; leave it out",
                key="rl.discount",
                cause=Cause.CONFLICT,
            )
        if self.dynamic_sampling and (self.group_size == 1 or algorithm.teacher):
            reason = (
                "learns from its teacher, not from rewards that differ"
                if algorithm.teacher
                else "with rl.group_size: 1 has no groups whose rewards could differ"
            )
            raise UserError(
                f"rl.dynamic_sampling: {self.algorithm} {reason}, so that nearly all that is "
                "sampled would be thrown away; set it to false",
                key="rl.dynamic_sampling",
                cause=Cause.CONFLICT,
            )
        return self

    @model_validator(mode="after")
    def _corrections_fit(self) -> Self:
        self._check_engine_mask()
        if self.reward_normalization == "each" and self.advantage_std != "group":
            raise UserError(
                f"rl.reward_normalization: each with rl.advantage_std: {self.advantage_std}: "
                "without the deviation of the group in each, the sum of advantages is the "
                "advantage of the sum; use an algorithm with advantage_std: group, or sum",
                key="rl.reward_normalization",
                cause=Cause.CONFLICT,
            )
        if self.reward_normalization == "each" and self.dynamic_sampling:
            raise UserError(
                "rl.reward_normalization: each with rl.dynamic_sampling, which passes over groups "
                "whose sums of rewards are equal, though their rewards may differ; set "
                "rl.dynamic_sampling: false",
                key="rl.reward_normalization",
                cause=Cause.CONFLICT,
            )
        return self

    def _check_engine_mask(self) -> None:
        """Raise UserError for an engine mask whose bounds do not fit its method.

        Likewise for one whose method does not fit `ratio_level`."""
        make_engine_mask_settings(
            self.engine_mask, self.engine_mask_low, self.engine_mask_high, self.ratio_level
        )

    @property
    def engine_mask_settings(self) -> EngineMaskSettings:
        """The mask by engine and trainer, with its bounds."""
        low, high = self.engine_mask_low, self.engine_mask_high
        return make_engine_mask_settings(self.engine_mask, low, high, self.ratio_level)

    def loss_settings(self, max_response_tokens: int) -> LossSettings:
        """Return the settings of the algorithm's loss.

        Args:
            max_response_tokens: the limit in the step's `rollout` section."""
        kl_in_reward = algorithms.find_rules(self.algorithm).kl_in_reward
        return LossSettings(
            loss_average=self.loss_average,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            max_response_tokens=max_response_tokens,
            dual_clip=self.dual_clip,
            ratio_level=self.ratio_level,
            importance_cap=self.importance_cap,
            kl_beta=0.0 if kl_in_reward else self.kl_beta,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
            options=self.options,
            engine_mask=self.engine_mask_settings,
        )

    @property
    def token_advantage_settings(self) -> TokenAdvantageSettings:
        """The settings of the algorithm's token advantages."""
        return TokenAdvantageSettings(
            **{field.name: getattr(self, field.name) for field in fields(TokenAdvantageSettings)}
        )
