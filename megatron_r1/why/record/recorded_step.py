"""Holds what is left of a step in a run's folder: settings, metrics, finished groups and
checkpoints.

The advantages of its responses are made by this command's own formulas of their logged rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from r1_grading.terms import weights_at

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import AlgorithmRules, find_rules
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import SamplingRecord
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints import checkpoint_folders as checkpoints
from megatron_r1.why import formulas
from megatron_r1.why.comparison import ResponseIndex
from megatron_r1.why.record.step_sequences import TokenSequence, response_sequences

MAX_STEPS_FACTOR = 16
"""How many times longer or shorter a run may have been planned than it is now."""
RATE_TOLERANCE = 1e-9
"""Relative: a product of a few float64."""
GroupRewards = list[list[float | None]]
"""The rewards that are trained on, by group; None for an ungraded response."""


@dataclass(frozen=True)
class RecordedStep:
    """A step of a run, read from its folder.

    Attributes:
        folder: the run's folder.
        run_config: the run's settings.
        step: the step, from 1.
        metrics_row: its line of metrics.jsonl.
        groups: those it was trained on, in the order in which the trainer got them.
        filtered_groups: groups that dynamic sampling left out.
        sampling: how each of both was sampled, first those that were trained on.
        prompts: the run's questions by id; those that could not be read are missing.
        missing_prompts_reason: why they could not, or "".
        training_prompts: the questions to train on, in the order of the data; empty where they
            could not be read.
        num_damaged_bytes: bytes of the sample log that belong to no whole record, where groups are
            missing in it."""

    folder: RunFolder
    run_config: Config
    step: int
    metrics_row: Mapping[str, Any]
    groups: list[Group]
    filtered_groups: list[Group]
    sampling: list[SamplingRecord | None]
    prompts: Mapping[str, Prompt]
    missing_prompts_reason: str = ""
    training_prompts: Sequence[Prompt] = ()
    num_damaged_bytes: int = 0

    @cached_property
    def config(self) -> Config:
        """The run's settings as `rl.schedule` has them at this step."""
        return self.run_config.at(self.step)

    @cached_property
    def rules(self) -> AlgorithmRules:
        """The rules of the run's algorithm."""
        return find_rules(self.run_config.rl.algorithm)

    @property
    def has_response_advantages(self) -> bool:
        """Whether `formulas.recomputed_advantages` gives each response its advantage."""
        is_recomputed = self.rules.recomputed_baseline is not None and not self.rules.kl_in_reward
        return is_recomputed and self.config.rl.reward_normalization == "sum"

    @cached_property
    def model(self) -> Path:
        """The folder of the model that the run began with, or the run's export of it."""
        return _model_folder(self.folder, self.run_config)

    @cached_property
    def hf_config(self) -> HFConfig:
        """The model's config.json."""
        return read_hf_config(str(self.model))

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer and template that the settings name."""
        return PromptTokenizer(
            str(self.model),
            self.run_config.data.template,
            stop_token_ids=self.run_config.rollout.stop_token_ids,
        )

    @property
    def checkpoint_before(self) -> Path | None:
        """What holds the weights before the step: a checkpoint, or the model that the run began
        with; None where neither is there."""
        return weights_after(self.folder, self.run_config, self.step - 1)

    @property
    def checkpoint_after(self) -> Path | None:
        """The step's checkpoint, with the weights after its updates; None where it is not there."""
        return weights_after(self.folder, self.run_config, self.step)

    @cached_property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward in the step."""
        return weights_at(self.config.rewards.weights, self.step)

    def updates_after(self, step: int) -> int:
        """Return the policy's updates up to the end of a step."""
        config = self.run_config
        warm = config.critic.warmup_steps if self.rules.critic else 0
        return max(0, config.updates_before(step + 1) - config.updates_before(warm + 1))

    @cached_property
    def scheduled_steps(self) -> int:
        """The steps that the learning rate decayed over: run.steps; if the run was made longer
        later, the first number of steps that gives the logged rate."""
        steps, logged_rate = self.run_config.run.steps, self.metrics_row.get("learning_rate")
        if self.config.optimizer.decay == "constant" or not isinstance(logged_rate, int | float):
            return steps
        for num_steps in (steps, *range(self.step, MAX_STEPS_FACTOR * steps + 1)):
            rates = self._scheduled_rates(num_steps)
            if math.isclose(sum(rates) / len(rates), logged_rate, rel_tol=RATE_TOLERANCE):
                return num_steps
        return steps

    @cached_property
    def learning_rates(self) -> list[float]:
        """The learning rate of each update of the step, by `formulas`."""
        return self._scheduled_rates(self.scheduled_steps)

    def _scheduled_rates(self, num_steps: int) -> list[float]:
        settings = self.config.optimizer
        return [
            formulas.expected_learning_rate(
                self.updates_after(self.step - 1) + index + 1,
                self.updates_after(num_steps),
                highest=settings.learning_rate,
                lowest=settings.min_learning_rate,
                warmup=settings.warmup_updates,
                decay=settings.decay,
            )
            for index in range(self.config.rl.minibatches)
        ]

    @cached_property
    def responses(self) -> dict[ResponseIndex, GradedResponse]:
        """The responses that were trained on, by their index."""
        return {
            (group_index, index): graded
            for group_index, group in enumerate(self.groups)
            for index, graded in enumerate(group.responses)
        }

    def response_limit(self, index: ResponseIndex) -> float:
        """Return the most tokens of a response: prompt and response share the positions."""
        rollout = self.config.rollout
        positions = rollout.max_model_len or self.hf_config.get("max_position_embeddings", math.inf)
        limit = positions - len(self.groups[index[0]].prompt_ids)
        return float(min(rollout.max_response_tokens, limit))

    @cached_property
    def training_rewards(self) -> GroupRewards:
        """The rewards that advantages are made of, by group; None for an ungraded response."""
        return self.rewards_with_penalty(self.config.rl.overlong_penalty)

    def rewards_with_penalty(self, overlong_penalty: float) -> GroupRewards:
        """Return the rewards by group, None for an ungraded response, less a penalty of long
        responses.

        Args:
            overlong_penalty: its largest value, in place of `rl.overlong_penalty`."""
        return group_rewards(self.groups, self.config, overlong_penalty)

    @cached_property
    def advantages(self) -> list[list[float]]:
        """Advantages by this command's own formulas; NaN: not trained on. Zeros for an algorithm
        whose rules have no `recomputed_baseline`."""
        return response_advantages(
            self.groups, self.config, self.training_rewards, self.reward_weights
        )

    @cached_property
    def sequences(self) -> list[TokenSequence]:
        """All sequences of the step, by group and response."""
        sequences: list[TokenSequence] = []
        shape = routing_shape(self.hf_config) if self.config.rl.routing_replay else None
        for group_index, group in enumerate(self.groups):
            for index, graded in enumerate(group.responses):
                advantage = self.advantages[group_index][index]
                sequences += response_sequences(
                    (group_index, index), group, graded, advantage, shape
                )
        return sequences

    def loss_fraction(self, indices: Sequence[ResponseIndex]) -> float:
        """Return the fraction of the loss that some responses have: of the sum of |advantage| times
        weight, where the weight is that of `rl.loss_average`. NaN where no response has an
        advantage."""

        def weight(index: ResponseIndex) -> float:
            advantage = self.advantages[index[0]][index[1]]
            count = len(self.responses[index].response.token_ids)
            by_tokens = self.config.rl.loss_average != "sequence"
            return 0.0 if math.isnan(advantage) else abs(advantage) * (count if by_tokens else 1)

        total = sum(map(weight, self.responses))
        return sum(map(weight, dict.fromkeys(indices))) / total if total else math.nan


def weights_after(folder: RunFolder, config: Config, step: int) -> Path | None:
    """Return what holds the weights after a step: its checkpoint, for step 0 the model or
    checkpoint that the run began with; None where it is not there.

    Args:
        folder: the run's folder.
        config: its settings.
        step: its number; 0: before the first."""
    if step > 0:
        path = checkpoints.checkpoint_path(folder.checkpoints, step)
        return path if path.is_dir() else None
    begin = Path(config.model.checkpoint or config.model.path)
    return begin if step == 0 and begin.is_dir() else None


def _model_folder(folder: RunFolder, config: Config) -> Path:
    """Return the model that the run began with, or where that is gone the run's export, which has
    its tokenizer.

    Raises:
        UserError: neither is there.
    """
    for path in (Path(config.model.path), folder.hf_folder):
        if (path / "config.json").is_file():
            return path
    raise UserError(
        f"model.path: {config.model.path} is not here (relative to {Path.cwd()}), and "
        f"{folder.hf_folder} is not either; run this where the run was started, or put the model "
        "there",
        key="model.path",
        cause=Cause.NOT_FOUND,
    )


def group_rewards(groups: Sequence[Group], config: Config, overlong_penalty: float) -> GroupRewards:
    """Return the rewards by group, None for an ungraded response, less a penalty of long
    responses.

    Args:
        groups: those that are trained on.
        config: the settings at their step.
        overlong_penalty: its largest value, in place of `rl.overlong_penalty`."""
    rl, limit = config.rl, config.rollout.max_response_tokens
    return [
        [
            formulas.expected_training_reward(
                graded.reward if graded.is_graded else None,
                len(graded.response.token_ids),
                limit,
                rl.overlong_buffer,
                overlong_penalty,
            )
            for graded in group.responses
        ]
        for group in groups
    ]


def response_advantages(
    groups: Sequence[Group],
    config: Config,
    training_rewards: GroupRewards,
    reward_weights: dict[str, float],
) -> list[list[float]]:
    """Return advantages by this command's own formulas; NaN: not trained on.

    They are zeros for an algorithm whose rules have no `recomputed_baseline`.

    Args:
        groups: those that are trained on.
        config: the settings at their step.
        training_rewards: the rewards that advantages are made of.
        reward_weights: the weight of each reward in the step."""
    rl, rules = config.rl, find_rules(config.rl.algorithm)
    if rules.recomputed_baseline is None:
        by_group = [[0.0] * len(rewards) for rewards in training_rewards]
    elif rl.reward_normalization == "each":
        by_group = formulas.reward_term_advantages(
            *_reward_terms(groups, config, reward_weights),
            rules,
            rl.advantage_std,
            rl.advantage_epsilon,
        )
    else:
        by_group = formulas.recomputed_advantages(
            training_rewards, rules, rl.advantage_std, rl.advantage_epsilon
        )
    if rl.truncated == "mask":
        for group_advantages, group in zip(by_group, groups, strict=True):
            group_advantages[:] = [
                math.nan if graded.is_truncated else a
                for a, graded in zip(group_advantages, group.responses, strict=True)
            ]
    return by_group


def _reward_terms(
    groups: Sequence[Group], config: Config, reward_weights: dict[str, float]
) -> tuple[dict[str, GroupRewards], dict[str, float]]:
    """Return the rewards by name and group, with that of the length, and their weights."""
    rl, limit = config.rl, config.rollout.max_response_tokens
    weights = reward_weights
    rewards: dict[str, GroupRewards] = {
        name: [
            [graded.rewards[name] if graded.is_graded else None for graded in group.responses]
            for group in groups
        ]
        for name in weights
    }
    if rl.overlong_buffer:
        weights = {**weights, "": rl.overlong_penalty}
        rewards[""] = [
            [
                formulas.expected_training_reward(
                    0.0 if graded.is_graded else None,
                    len(graded.response.token_ids),
                    limit,
                    rl.overlong_buffer,
                    1.0,
                )
                for graded in group.responses
            ]
            for group in groups
        ]
    return rewards, weights
