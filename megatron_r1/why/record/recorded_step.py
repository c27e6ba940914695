"""What is left of a step in a run's folder: settings, metrics, finished groups and checkpoints, and
the rewards, advantages and sequences that they give."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from r1_grading.terms import weights_at

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import (
    SamplingRecord,
)
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.models.experts import RoutingShape, routing_shape
from megatron_r1.models.hf_config import HFConfig, read_hf_config
from megatron_r1.models.sampling_mask import DecodedMask, decode_mask
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints import checkpoint_folders as checkpoints
from megatron_r1.why import formulas
from megatron_r1.why.comparison import ResponseIndex

MAX_STEPS_FACTOR = 16
"""How many times longer or shorter a run may have been planned than it is now."""
RATE_TOLERANCE = 1e-9
"""Relative: a product of a few float64."""


class TokenSequence(NamedTuple):
    """One sequence of tokens that is trained on: a response behind its prompt, or a branch.

    Attributes:
        response: its response.
        token_ids: int32.
        is_sampled: bool.
        logprobs: float32, of the sampled tokens.
        versions: int32, likewise.
        advantage: NaN: not trained on.
        num_sampled: the sampled tokens of the response.
        kept_ids: the ids that the engine drew each sampled token from; None: the whole vocabulary.
        experts: int16, (tokens, MoE layers, experts per token), those that the engine chose, -1
            where it chose none; None without routing replay."""

    response: ResponseIndex
    token_ids: np.ndarray
    is_sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    advantage: float
    num_sampled: int
    kept_ids: DecodedMask | None
    experts: np.ndarray | None


@dataclass(frozen=True)
class RecordedStep:
    """A step of a run, read from its folder.

    Attributes:
        folder: the run's folder.
        run_config: the run's settings.
        step: the step, from 1.
        line: its line of metrics.jsonl.
        groups: those it was trained on, in the order in which the trainer got them.
        filtered_groups: groups that dynamic sampling left out.
        sampling: how each of both was sampled, first those that were trained on.
        prompts: the run's questions by id; those that could not be read are missing.
        missing_prompts_reason: why they could not, or "".
        training_prompts: the questions to train on, in the order of the data; empty where they
            could not be read."""

    folder: RunFolder
    run_config: Config
    step: int
    line: Mapping[str, Any]
    groups: list[Group]
    filtered_groups: list[Group]
    sampling: list[SamplingRecord | None]
    prompts: Mapping[str, Prompt]
    missing_prompts_reason: str = ""
    training_prompts: Sequence[Prompt] = ()

    @cached_property
    def config(self) -> Config:
        """The run's settings as `rl.schedule` has them at this step."""
        return self.run_config.at(self.step)

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
        warm = config.critic.warmup_steps if config.rl.algorithm == "ppo" else 0
        return max(0, config.updates_before(step + 1) - config.updates_before(warm + 1))

    @cached_property
    def scheduled_steps(self) -> int:
        """The steps that the learning rate decayed over: run.steps, or where that does not give the
        logged rate, as a run may be made longer later, the first number that does."""
        steps, logged_rate = self.run_config.run.steps, self.line.get("learning_rate")
        if self.config.optimizer.decay == "constant" or not isinstance(logged_rate, int | float):
            return steps
        for num_steps in (steps, *range(self.step, MAX_STEPS_FACTOR * steps + 1)):
            rates = self._rates(num_steps)
            if math.isclose(sum(rates) / len(rates), logged_rate, rel_tol=RATE_TOLERANCE):
                return num_steps
        return steps

    @cached_property
    def learning_rates(self) -> list[float]:
        """The learning rate of each update of the step, by `formulas`."""
        return self._rates(self.scheduled_steps)

    def _rates(self, num_steps: int) -> list[float]:
        settings = self.config.optimizer
        return [
            formulas.learning_rate(
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
    def training_rewards(self) -> list[list[float | None]]:
        """The rewards that advantages are made of, by group; None for an ungraded response."""
        return self.rewards_with_penalty(self.config.rl.overlong_penalty)

    def rewards_with_penalty(self, overlong_penalty: float) -> list[list[float | None]]:
        """Return the rewards by group, None for an ungraded response, less a penalty of long
        responses.

        Args:
            overlong_penalty: its largest value, in place of `rl.overlong_penalty`."""
        rl, limit = self.config.rl, self.config.rollout.max_response_tokens
        return [
            [
                formulas.training_reward(
                    graded.reward if graded.is_graded else None,
                    len(graded.response.token_ids),
                    limit,
                    rl.overlong_buffer,
                    overlong_penalty,
                )
                for graded in group.responses
            ]
            for group in self.groups
        ]

    @cached_property
    def advantages(self) -> list[list[float]]:
        """Advantages by this command's own formulas; NaN: not trained on. Zeros for algorithms
        that `formulas` does not have."""
        rl = self.config.rl
        if rl.algorithm not in (
            *formulas.RESPONSE_ADVANTAGE_ALGORITHMS,
            *formulas.TOKEN_ADVANTAGE_ALGORITHMS,
        ):
            by_group = [[0.0] * len(rewards) for rewards in self.training_rewards]
        elif rl.reward_normalization == "each":
            by_group = formulas.reward_term_advantages(
                *self._reward_terms, rl.algorithm, rl.advantage_std, rl.advantage_epsilon
            )
        else:
            by_group = formulas.advantages(
                self.training_rewards, rl.algorithm, rl.advantage_std, rl.advantage_epsilon
            )
        if rl.truncated == "mask":
            for group_advantages, group in zip(by_group, self.groups, strict=True):
                group_advantages[:] = [
                    math.nan if graded.is_truncated else a
                    for a, graded in zip(group_advantages, group.responses, strict=True)
                ]
        return by_group

    @property
    def _reward_terms(self) -> tuple[dict[str, list[list[float | None]]], dict[str, float]]:
        """The rewards by name and group, with that of the length, and their weights."""
        rl, limit = self.config.rl, self.config.rollout.max_response_tokens
        weights = self.reward_weights
        rewards = {
            name: [
                [graded.rewards[name] if graded.is_graded else None for graded in group.responses]
                for group in self.groups
            ]
            for name in weights
        }
        if rl.overlong_buffer:
            weights = {**weights, "": rl.overlong_penalty}
            rewards[""] = [
                [
                    formulas.training_reward(
                        0.0 if graded.is_graded else None,
                        len(graded.response.token_ids),
                        limit,
                        rl.overlong_buffer,
                        1.0,
                    )
                    for graded in group.responses
                ]
                for group in self.groups
            ]
        return rewards, weights

    @cached_property
    def sequences(self) -> list[TokenSequence]:
        """All sequences of the step, by group and response."""
        sequences: list[TokenSequence] = []
        shape = routing_shape(self.hf_config) if self.config.rl.routing_replay else None
        for group_index, group in enumerate(self.groups):
            for index, graded in enumerate(group.responses):
                advantage = self.advantages[group_index][index]
                sequences += _sequences((group_index, index), group, graded, advantage, shape)
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
        step: the step."""
    if step > 0:
        path = checkpoints.checkpoint_path(folder.checkpoints, step)
        return path if path.is_dir() else None
    begin = Path(config.model.checkpoint or config.model.path)
    return begin if step == 0 and begin.is_dir() else None


def _sequences(
    index: ResponseIndex,
    group: Group,
    graded: GradedResponse,
    advantage: float,
    shape: RoutingShape | None,
) -> Iterator[TokenSequence]:
    """Yield the sequences of a response.

    Args:
        index: the response.
        group: its group.
        graded: the response.
        advantage: its advantage.
        shape: the sizes of the engine's routing; None: it is not replayed."""
    response, branches = graded.response, graded.episode.branches if graded.episode else []
    if not branches:
        ids = np.concatenate([np.asarray(group.prompt_ids, np.int32), response.token_ids])
        is_sampled = np.arange(len(ids)) >= len(group.prompt_ids)
        logprobs = np.asarray(response.logprobs, np.float32)
        versions, count = np.asarray(response.policy_versions), len(response.token_ids)
        trained_advantage = advantage if count else math.nan
        kept_ids = _decode_kept_ids(response.sampling_mask, np.ones(count, bool))
        experts = _experts(response.routing, len(ids), shape)
        yield TokenSequence(
            index, ids, is_sampled, logprobs, versions, trained_advantage, count, kept_ids, experts
        )
        return
    total = sum(branch.num_sampled for branch in branches)
    for branch in branches:
        is_sampled = np.frombuffer(branch.is_sampled, bool)
        end = int(np.flatnonzero(is_sampled)[-1]) + 1
        yield TokenSequence(
            index,
            np.asarray(branch.token_ids, np.int32)[:end],
            is_sampled[:end],
            np.asarray(branch.logprobs, np.float32)[is_sampled],
            np.asarray(branch.policy_versions)[is_sampled],
            advantage,
            total,
            _decode_kept_ids(branch.sampling_mask, np.frombuffer(branch.is_sampled, bool)),
            _experts(branch.routing, len(branch.token_ids), shape, end),
        )


def _decode_kept_ids(mask: bytes, is_sampled: np.ndarray) -> DecodedMask | None:
    """Return the kept ids of the sampled tokens.

    Args:
        mask: the ids of all tokens (`models.sampling_mask`); empty: there was no cut.
        is_sampled: (tokens,) bool; the others have no ids."""
    if not mask:
        return None
    counts, ids = decode_mask(mask, len(is_sampled))
    return DecodedMask(counts[is_sampled], ids)


def _experts(
    routing: bytes | memoryview, num_tokens: int, shape: RoutingShape | None, end: int | None = None
) -> np.ndarray | None:
    """Return the experts of each token, as `TokenSequence.experts`.

    Args:
        routing: rows of the tokens before the last, the first ones may be missing.
        num_tokens: the tokens that it belongs to.
        shape: its sizes; None: it is not replayed.
        end: the tokens that are wanted; the last of them is not fed to a model; None: all."""
    if shape is None:
        return None
    experts = np.full((num_tokens, len(shape.moe_layers), shape.topk), -1, np.int16)
    rows = np.frombuffer(routing, f"<u{shape.index_bytes}").reshape(-1, *experts.shape[1:])
    experts[num_tokens - 1 - len(rows) : num_tokens - 1] = rows
    experts = experts[:end]
    experts[-1:] = -1
    return experts


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
