"""A recipe: all sections together, with the rules between them."""

import re
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator
from r1_grading.terms import ScheduledWeight

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.agents import AgentsConfig
from megatron_r1.config.algorithms import find_rules
from megatron_r1.config.checkpoint import CheckpointConfig
from megatron_r1.config.critic import CriticConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.config.eval import EvalConfig
from megatron_r1.config.former_keys import check_removed_keys
from megatron_r1.config.fp8 import FP8Config
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.push import PushConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rewards import RewardsConfig
from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.sample import SampleConfig
from megatron_r1.config.schedule import changes_at, check_schedule_keys
from megatron_r1.config.section import Resumable, ResumableMark, ScheduledMark, Section, marked_keys
from megatron_r1.config.sft import SFTConfig
from megatron_r1.config.teacher import TeacherConfig
from megatron_r1.config.validation_errors import recipe_error


class Config(Section):
    """A whole recipe: one field per section, with the rules between sections."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    agents: AgentsConfig = AgentsConfig()
    push: PushConfig = PushConfig()
    rewards: RewardsConfig = RewardsConfig()
    rl: RLConfig = RLConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: Resumable[ParallelConfig] = ParallelConfig()
    checkpoint: Resumable[CheckpointConfig] = CheckpointConfig()
    eval: Resumable[EvalConfig] = EvalConfig()
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    critic: CriticConfig = CriticConfig()
    sample: SampleConfig = SampleConfig()
    fp8: FP8Config = FP8Config()

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        num_responses = self.rl.prompts_per_rollout * self.rl.group_size
        if num_responses % self.rl.minibatches:
            raise UserError(
                f"rl.minibatches: {self.rl.minibatches} does not divide the {num_responses} "
                f"responses of a rollout ({self.rl.prompts_per_rollout} questions x "
                f"{self.rl.group_size}); choose a divisor",
                key="rl.minibatches",
                cause=Cause.INDIVISIBLE,
            )
        if self.rl.staleness and self.rl.importance_cap is None:
            raise UserError(
                f"rl.staleness={self.rl.staleness} trains on tokens of older policies, which only "
                "an importance weight makes right: set rl.importance_cap, to 2.0 for instance",
                key="rl.importance_cap",
                cause=Cause.MISSING,
            )
        self._check_reward_normalization()
        if self.push.fp8 and self.rollout.dtype == "float32":
            raise UserError(
                "push.fp8: vLLM computes with FP8 weights in 16 bits only; set rollout.dtype: "
                "bfloat16 (it is float32), or push.fp8: false",
                key="push.fp8",
                cause=Cause.CONFLICT,
            )
        if self.rollout.colocated and self.rl.staleness:
            raise UserError(
                f"rollout.colocated: the engines sleep while the trainer computes, so that nothing "
                f"can be sampled ahead of it; set rl.staleness: 0 (it is {self.rl.staleness})",
                key="rollout.colocated",
                cause=Cause.CONFLICT,
            )
        self._check_offload()
        return self

    def _check_reward_normalization(self) -> None:
        weights = self.rewards.weights
        numbers = (w.weight if isinstance(w, ScheduledWeight) else w for w in weights.values())
        penalty = self.rl.overlong_buffer and self.rl.overlong_penalty
        if self.rl.reward_normalization == "each" and sum(map(bool, (*numbers, penalty))) < 2:
            raise UserError(
                "rl.reward_normalization: each with one reward in rewards.weights "
                f"({', '.join(weights)}): there is no other to normalize apart; set sum",
                key="rl.reward_normalization",
                cause=Cause.CONFLICT,
            )

    def _check_offload(self) -> None:
        key, parallel = "parallel.offload_between_phases", self.parallel
        if parallel.offload_between_phases != "disk" and parallel.offload_folder is not None:
            raise UserError(
                f"parallel.offload_folder={parallel.offload_folder} is read with {key}: disk only "
                f"(it is {parallel.offload_between_phases}); set that, or leave the folder out",
                key="parallel.offload_folder",
                cause=Cause.CONFLICT,
            )
        if parallel.offload_between_phases == "none":
            return
        if not self.rollout.colocated:
            raise UserError(
                f"{key}: {parallel.offload_between_phases} frees the trainer's memory for engines "
                "that use the same GPUs in turn with it; set rollout.colocated: true, or leave it "
                "out: next to engines of their own the trainer computes all the time",
                key=key,
                cause=Cause.CONFLICT,
            )
        if parallel.optimizer_offload:
            raise UserError(
                f"{key}: {parallel.offload_between_phases} moves all of the optimizer's state, and "
                f"parallel.optimizer_offload={parallel.optimizer_offload} keeps a share of it on "
                "the host; use one of the two",
                key=key,
                cause=Cause.CONFLICT,
            )

    @model_validator(mode="after")
    def _schedule_is_valid(self) -> Self:
        if self.rl.schedule:
            changed_keys = (key for entry in self.rl.schedule for key in entry.changes)
            check_removed_keys(changed_keys, "rl.schedule")
            check_schedule_keys(self.rl.schedule, SCHEDULED, known_keys())
        for entry in self.rl.schedule:
            tree = self.model_dump()
            tree["rl"]["schedule"] = []
            for section, values in changes_at(self.rl.schedule, entry.from_step).items():
                tree[section] |= values
            try:
                type(self).model_validate(tree)
            except ValidationError as failure:
                place = f"rl.schedule, from_step: {entry.from_step}"
                error = recipe_error(failure, type(self), known_keys(), place)
                error.key = "rl.schedule"
                raise error from None
        return self

    def at(self, step: int) -> Self:
        """Return the settings of a step, with what `rl.schedule` changes up to it."""
        sections = {}
        for name, values in changes_at(self.rl.schedule, step).items():
            section = getattr(self, name)
            sections[name] = type(section).model_validate(section.model_dump() | values)
        return self.model_copy(update=sections)

    def schedule_parts(self) -> list[tuple[int, Self]]:
        """Return (first step, settings) of each part of the run between changes of the schedule."""
        steps = [1, *(entry.from_step for entry in self.rl.schedule if entry.from_step > 1)]
        return [(step, self.at(step)) for step in steps]

    @property
    def uses_reference(self) -> bool:
        """Whether any step has a KL penalty.

        The reference is a policy of the past, which has to be copied when the run is there."""
        return any(part.rl.kl_beta > 0 for _, part in self.schedule_parts())

    def updates_before(self, step: int) -> int:
        """Return the number of optimizer steps that the rollouts before `step` make."""
        parts = self.schedule_parts()
        ends = [*(start for start, _ in parts[1:]), step]
        return sum(
            max(0, min(end, step) - start) * part.rl.minibatches
            for (start, part), end in zip(parts, ends, strict=True)
        )

    @property
    def num_policy_updates(self) -> int:
        """Updates of the policy in the whole RL run: none while its critic warms up."""
        warmup = self.critic.warmup_steps if find_rules(self.rl.algorithm).critic else 0
        return self.updates_before(self.run.steps + 1) - self.updates_before(warmup + 1)

    def with_changes(self, **sections: dict[str, Any]) -> Self:
        """Return a copy with other values, which are not checked, of some settings by section."""
        changed_sections = {
            name: getattr(self, name).model_copy(update=sections[name]) for name in sections
        }
        return self.model_copy(update=changed_sections)

    def critic_run_config(self) -> Self:
        """Return the recipe of the critic: the same run with it as the model, trained whole."""
        critic = self.critic
        model: dict[str, Any] = {"head": "score", "lora": None}
        if critic.path is not None:
            model |= {"path": critic.path, "checkpoint": None}
        # A model with a score head has no MTP layers (m), wherever the policy's are placed.
        layout = self.parallel.pipeline_layout
        if layout is not None:
            layout = re.sub(r"m(\*\d+)?", "", layout)
        rate, parallel = {"learning_rate": critic.learning_rate}, {"pipeline_layout": layout}
        return self.with_changes(model=model, optimizer=rate, parallel=parallel)


RESUMABLE = tuple(marked_keys(Config, ResumableMark))
"""Keys and sections that may differ when a run continues (`section.Resumable`)."""
SCHEDULED = tuple(marked_keys(Config, ScheduledMark))
"""Keys that `rl.schedule` can change during a run (`section.Scheduled`)."""


Verb = Literal["rl", "sft", "reward-model", "sample"]


def infer_verb(config: Config) -> Verb:
    """Return the verb that a recipe is for, from its sections that are not the default."""
    if config.model.head == "score" or config.reward_model != RewardModelConfig():
        return "reward-model"
    if config.sft != SFTConfig():
        return "sft"
    return "sample" if config.sample != SampleConfig() else "rl"


def known_keys() -> list[str]:
    """Return every `section.key`."""
    return [f"{name}.{key}" for name, section in Config() for key in type(section).model_fields]
