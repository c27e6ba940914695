"""What is left of a step in a run's folder: settings, metrics, finished groups, checkpoints, and
which steps have enough of it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from r1_grading.terms import weights_at

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.commands.why import formulas
from megatron_r1.commands.why.comparison import ResponseIndex
from megatron_r1.config import Config
from megatron_r1.config.rl import digest_until
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import (
    GroupRecord,
    SamplingRecord,
    decode,
    step_log_path,
    unpack,
)
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import Prompt, load_prompts
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.models.sampling_mask import DecodedMask, decode_mask
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints import checkpoint_folders as checkpoints

MAX_LONGER = 16
"""How many times longer or shorter a run may have been planned than it is now."""
SAME_RATE = 1e-9
"""Relative: a product of a few float64."""


class Examinable(NamedTuple):
    """A step with a sample log, and what else of it is left."""

    step: int
    has_before: bool
    has_after: bool


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
        kept: the ids that the engine drew each sampled token from; None: the whole vocabulary."""

    response: ResponseIndex
    token_ids: np.ndarray
    is_sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    advantage: float
    num_sampled: int
    kept: DecodedMask | None


@dataclass(frozen=True)
class RecordedStep:
    """A step of a run, read from its folder.

    Attributes:
        run_config: the run's settings.
        step: the step, from 1.
        line: its line of metrics.jsonl.
        groups: those it was trained on, in the order in which the trainer got them.
        passed_over: groups that dynamic sampling left out.
        sampling: how each of both was sampled, first those that were trained on.
        prompts: the run's questions by id; those that could not be read are missing.
        prompts_missing: why they could not, or ""."""

    folder: RunFolder
    run_config: Config
    step: int
    line: Mapping[str, Any]
    groups: list[Group]
    passed_over: list[Group]
    sampling: list[SamplingRecord | None]
    prompts: Mapping[str, Prompt]
    prompts_missing: str = ""

    @cached_property
    def config(self) -> Config:
        """The run's settings as `rl.schedule` has them at this step."""
        return self.run_config.at(self.step)

    @cached_property
    def model(self) -> Path:
        """The folder of the model that the run began with, or the run's export of it."""
        return _model_folder(self.folder, self.run_config)

    @cached_property
    def hf(self) -> dict[str, Any]:
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
    def before(self) -> Path | None:
        """What holds the weights before the step: a checkpoint, or the model that the run began
        with; None where neither is there."""
        return weights_after(self.folder, self.run_config, self.step - 1)

    @property
    def after(self) -> Path | None:
        """The step's checkpoint, with the weights after its updates; None where it is not there."""
        return weights_after(self.folder, self.run_config, self.step)

    @cached_property
    def weights(self) -> dict[str, float]:
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
        steps, logged = self.run_config.run.steps, self.line.get("learning_rate")
        if self.config.optimizer.decay == "constant" or not isinstance(logged, int | float):
            return steps
        for tried in (steps, *range(self.step, MAX_LONGER * steps + 1)):
            rates = self._rates(tried)
            if math.isclose(sum(rates) / len(rates), logged, rel_tol=SAME_RATE):
                return tried
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
                warmup=settings.warmup,
                decay=settings.decay,
            )
            for index in range(self.config.rl.minibatches)
        ]

    @cached_property
    def responses(self) -> dict[ResponseIndex, GradedResponse]:
        """The responses that were trained on, by their index."""
        return {
            (at, index): graded
            for at, group in enumerate(self.groups)
            for index, graded in enumerate(group.responses)
        }

    @cached_property
    def training_rewards(self) -> list[list[float | None]]:
        """The rewards that advantages are made of, by group; None for an ungraded response."""
        rl, limit = self.config.rl, self.config.rollout.max_response_tokens
        return [
            [
                formulas.training_reward(
                    graded.reward if graded.is_graded else None,
                    len(graded.response.token_ids),
                    limit,
                    rl.overlong_buffer,
                    rl.overlong_penalty,
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
        if rl.algorithm not in (*formulas.ALGORITHMS, *formulas.OF_TOKENS):
            made = [[0.0] * len(rewards) for rewards in self.training_rewards]
        elif rl.reward_normalization == "each":
            made = formulas.each_advantages(
                *self._each_reward, rl.algorithm, rl.advantage_std, rl.advantage_epsilon
            )
        else:
            made = formulas.advantages(
                self.training_rewards, rl.algorithm, rl.advantage_std, rl.advantage_epsilon
            )
        if rl.truncated == "mask":
            for own, group in zip(made, self.groups, strict=True):
                own[:] = [
                    math.nan if graded.truncated else a
                    for a, graded in zip(own, group.responses, strict=True)
                ]
        return made

    @property
    def _each_reward(self) -> tuple[dict[str, list[list[float | None]]], dict[str, float]]:
        """The rewards by name and group, with that of the length, and their weights."""
        rl, limit, weights = self.config.rl, self.config.rollout.max_response_tokens, self.weights
        rewards = {
            name: [
                [each.rewards[name] if each.is_graded else None for each in group.responses]
                for group in self.groups
            ]
            for name in weights
        }
        if rl.overlong_buffer:
            weights = {**weights, "": rl.overlong_penalty}
            rewards[""] = [
                [
                    formulas.training_reward(
                        0.0 if each.is_graded else None,
                        len(each.response.token_ids),
                        limit,
                        rl.overlong_buffer,
                        1.0,
                    )
                    for each in group.responses
                ]
                for group in self.groups
            ]
        return rewards, weights

    @cached_property
    def sequences(self) -> list[TokenSequence]:
        """All sequences of the step, by group and response."""
        made: list[TokenSequence] = []
        for at, group in enumerate(self.groups):
            for index, graded in enumerate(group.responses):
                made += _sequences((at, index), group, graded, self.advantages[at][index])
        return made

    def loss_fraction(self, concerned: Sequence[ResponseIndex]) -> float:
        """Return the fraction of the loss that some responses have: of the sum of |advantage| times
        weight, where the weight is that of `rl.loss_average`. NaN where no response has an
        advantage."""

        def weight(index: ResponseIndex) -> float:
            advantage = self.advantages[index[0]][index[1]]
            count = len(self.responses[index].response.token_ids)
            by_tokens = self.config.rl.loss_average != "sequence"
            return 0.0 if math.isnan(advantage) else abs(advantage) * (count if by_tokens else 1)

        total = sum(map(weight, self.responses))
        return sum(map(weight, dict.fromkeys(concerned))) / total if total else math.nan


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """Return a run's folder and settings.

    Raises:
        UserError: a folder without an RL run.
    """
    folder = RunFolder(path)
    if not folder.config_path.is_file():
        raise UserError(
            f"{path}: no config.yaml is here; give the folder of a run",
            key="RUN",
            cause=Cause.NOT_FOUND,
        )
    config = configuration.load(str(folder.config_path))
    if configuration.infer_verb(config) != "rl" and not folder.sample_log.is_dir():
        raise UserError(
            f"{path}: this run has no rollouts; give the folder of an rl run",
            key="RUN",
            cause=Cause.UNSUPPORTED,
        )
    return folder, config


def examinable(folder: RunFolder, config: Config) -> list[Examinable]:
    """Return the finished steps that have a sample log."""
    finished = sorted({line["step"] for line in folder.read_metrics()})
    return [
        Examinable(
            step,
            weights_after(folder, config, step - 1) is not None,
            weights_after(folder, config, step) is not None,
        )
        for step in finished
        if step_log_path(folder.sample_log, step).is_file()
    ]


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


def choose(steps: Sequence[Examinable], wanted: int | None, folder: Path) -> Examinable:
    """Return the step to examine: the wanted one, or the newest with most left of it.

    Args:
        steps: those with a sample log.
        wanted: its number, or None.
        folder: the run's folder, for errors.

    Raises:
        UserError: the step has no sample log, or none has one."""
    if not steps:
        raise UserError(
            f"{folder}: no finished step has a sample log, which why recomputes; start the run "
            "with --rl.keep_sample_log true --checkpoint.keep_every 1",
            key="RUN",
            cause=Cause.EMPTY,
        )
    if wanted is None:
        return max(steps, key=lambda each: (each.has_before + each.has_after, each.step))
    found = next((each for each in steps if each.step == wanted), None)
    if found is None:
        there = ", ".join(str(each.step) for each in steps)
        raise UserError(
            f"--step {wanted}: {folder} has no sample log of that step; it has those of {there}",
            key="--step",
            cause=Cause.NOT_FOUND,
        )
    return found


def read_step(folder: RunFolder, config: Config, step: int) -> RecordedStep:
    """Read a step.

    Args:
        folder: the run's folder.
        config: the run's settings.
        step: a finished step with a sample log.

    Raises:
        UserError: records of another version of this program, or none of the step's settings."""
    return next(read_steps(folder, config, [step]))


def read_steps(folder: RunFolder, config: Config, steps: Iterable[int]) -> Iterator[RecordedStep]:
    """Yield steps, for all of which questions and metrics are read once.

    Args:
        folder: the run's folder.
        config: the run's settings.
        steps: finished steps with a sample log.

    Raises:
        UserError: as `read_step`."""
    prompts, missing = _prompts(folder, config)
    lines = {line["step"]: line for line in folder.read_metrics()}
    for step in steps:
        yield _read_step_log(folder, config, lines[step], prompts, missing)


def _read_step_log(
    folder: RunFolder,
    config: Config,
    line: Mapping[str, Any],
    prompts: Mapping[str, Prompt],
    missing: str,
) -> RecordedStep:
    step = line["step"]
    path = step_log_path(folder.sample_log, step)
    schedule = digest_until(config.rl.schedule, step)
    records: dict[int, GroupRecord] = {}
    for payload in FramedFile.read(path, repair=False):
        record = decode(payload)
        if isinstance(record, GroupRecord) and record.schedule == schedule:
            records[record.position] = record
    if not records:
        raise UserError(
            f"{path}: no group of these settings is in it; it is damaged, or of another run",
            key="--step",
            cause=Cause.EMPTY,
        )
    ordered = [records[position] for position in sorted(records)]
    groups = [
        unpack(record, prompts.get(record.prompt_id) or Prompt(record.prompt_id, "", "", None))
        for record in ordered
    ]
    sampling = {id(group): record.sampling for group, record in zip(groups, ordered, strict=True)}
    at_step = config.at(step)
    passed_over: list[Group] = []
    if at_step.rl.dynamic_sampling:
        groups, passed_over = _trained_on(groups, at_step.rl.questions_per_rollout)
    return RecordedStep(
        folder,
        config,
        step,
        line,
        groups,
        passed_over,
        [sampling[id(group)] for group in groups + passed_over],
        prompts,
        missing,
    )


def _trained_on(groups: list[Group], count: int) -> tuple[list[Group], list[Group]]:
    """Return groups as dynamic sampling chooses them: those with different rewards first, then
    others up to the count; and the rest."""
    different = [group for group in groups if not group.has_equal_rewards]
    equal = [group for group in groups if group.has_equal_rewards]
    missing = max(0, count - len(different))
    return different + equal[:missing], equal[missing:]


def _sequences(
    index: ResponseIndex, group: Group, graded: GradedResponse, advantage: float
) -> Iterator[TokenSequence]:
    response, branches = graded.response, graded.episode.branches if graded.episode else []
    if not branches:
        ids = np.concatenate([np.asarray(group.prompt_ids, np.int32), response.token_ids])
        sampled = np.arange(len(ids)) >= len(group.prompt_ids)
        logprobs = np.asarray(response.logprobs, np.float32)
        versions, count = np.asarray(response.policy_versions), len(response.token_ids)
        own = advantage if count else math.nan
        kept = _kept(response.sampling_mask, np.ones(count, bool))
        yield TokenSequence(index, ids, sampled, logprobs, versions, own, count, kept)
        return
    total = sum(branch.num_sampled for branch in branches)
    for branch in branches:
        sampled = np.frombuffer(branch.is_sampled, bool)
        end = int(np.flatnonzero(sampled)[-1]) + 1
        yield TokenSequence(
            index,
            np.asarray(branch.token_ids, np.int32)[:end],
            sampled[:end],
            np.asarray(branch.logprobs, np.float32)[sampled],
            np.asarray(branch.policy_versions)[sampled],
            advantage,
            total,
            _kept(branch.sampling_mask, np.frombuffer(branch.is_sampled, bool)),
        )


def _kept(mask: bytes, is_sampled: np.ndarray) -> DecodedMask | None:
    """Return the kept ids of the sampled tokens.

    Args:
        mask: the ids of all tokens (`models.sampling_mask`); empty: there was no cut.
        is_sampled: (tokens,) bool; the others have no ids."""
    if not mask:
        return None
    counts, ids = decode_mask(mask, len(is_sampled))
    return DecodedMask(counts[is_sampled], ids)


def _model_folder(folder: RunFolder, config: Config) -> Path:
    """Return the model that the run began with, or where that is gone the run's export, which has
    its tokenizer.

    Raises:
        UserError: neither is there.
    """
    for path in (Path(config.model.path), folder.hf):
        if (path / "config.json").is_file():
            return path
    raise UserError(
        f"model.path: {config.model.path} is not here (relative to {Path.cwd()}), and {folder.hf} "
        "is not either; run this where the run was started, or put the model there",
        key="model.path",
        cause=Cause.NOT_FOUND,
    )


def _prompts(folder: RunFolder, config: Config) -> tuple[dict[str, Prompt], str]:
    """Return the questions of the run by id, and why they are not all: where the data is not here,
    those of samples.jsonl."""
    data = config.data
    try:
        split = load_prompts(
            path=data.path,
            heldout_path=data.heldout_path,
            task=data.task,
            parameters=data.parameters,
            seed=data.seed,
            kind=data.kind,
            columns=data.columns,
            num_train=data.num_train,
            num_heldout=data.num_heldout,
            heldout_fraction=data.heldout_fraction,
            where=data.where,
            no_truth=data.no_truth,
            bad_rows=data.bad_rows,
        )
    except UserError as error:
        lines = (line for line in read_lines(folder.samples_path) if line.get("split") == "train")
        known = {
            line["id"]: Prompt(line["id"], line["question"], data.kind or "", line["truth"])
            for line in lines
            if "id" in line
        }
        return known, f"the questions could not be read: {error}"
    return {prompt.id: prompt for prompt in [*split.train, *split.heldout]}, ""
