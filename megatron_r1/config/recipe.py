"""A recipe: all sections together, read from YAML and the command line."""

import difflib
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import ValidationError, model_validator

from megatron_r1.config.agents import AgentsConfig
from megatron_r1.config.engines import RolloutConfig, TeacherConfig
from megatron_r1.config.evaluation import EvalConfig
from megatron_r1.config.keys import keys_of
from megatron_r1.config.mistakes import explain
from megatron_r1.config.other_models import CriticConfig, RewardModelConfig
from megatron_r1.config.push import PushConfig
from megatron_r1.config.rl import RewardsConfig, RLConfig
from megatron_r1.config.run import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from megatron_r1.config.sample import SampleConfig
from megatron_r1.config.schedule import changes_at
from megatron_r1.config.section import Resumable, Section, resumable_keys
from megatron_r1.config.training import FP8Config, OptimizerConfig, ParallelConfig, SFTConfig
from megatron_r1.config.yaml_text import put, read_sections
from megatron_r1.errors import UserError, did_you_mean

T = TypeVar("T", bound=Section)


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
        num_responses = self.rl.questions_per_rollout * self.rl.group_size
        if num_responses % self.rl.minibatches:
            raise ValueError(
                f"rl.minibatches: {self.rl.minibatches} does not divide the {num_responses} "
                f"responses of a rollout ({self.rl.questions_per_rollout} questions x "
                f"{self.rl.group_size}); choose a divisor"
            )
        if self.rl.staleness and self.rl.importance_cap is None:
            raise ValueError(
                f"rl.staleness={self.rl.staleness} trains on tokens of older policies, which only "
                "an importance weight makes right: set rl.importance_cap, to 2.0 for instance"
            )
        if self.push.fp8 and self.rollout.dtype == "float32":
            raise ValueError(
                "push.fp8: vLLM computes with FP8 weights in 16 bits only; set rollout.dtype: "
                "bfloat16 (it is float32), or push.fp8: false"
            )
        if self.rollout.colocated and self.rl.staleness:
            raise ValueError(
                f"rollout.colocated: the engines sleep while the trainer computes, so that nothing "
                f"can be sampled ahead of it; set rl.staleness: 0 (it is {self.rl.staleness})"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_valid(self) -> Self:
        for entry in self.rl.schedule:
            tree = self.model_dump()
            tree["rl"]["schedule"] = []
            for section, values in changes_at(self.rl.schedule, entry.from_step).items():
                tree[section] |= values
            try:
                type(self).model_validate(tree)
            except ValidationError as failure:
                reasons = explain(failure, type(self), known_keys())
                raise ValueError(f"rl.schedule, from_step: {entry.from_step}: {reasons}") from None
        return self

    def at(self, step: int) -> Self:
        """Return the settings of a step, with what `rl.schedule` changes up to it."""
        sections = {}
        for name, values in changes_at(self.rl.schedule, step).items():
            section = getattr(self, name)
            sections[name] = type(section).model_validate(section.model_dump() | values)
        return self.model_copy(update=sections)

    def phases(self) -> list[tuple[int, Self]]:
        """Return (first step, settings) of each part of the run between changes of the schedule."""
        steps = [1, *(entry.from_step for entry in self.rl.schedule if entry.from_step > 1)]
        return [(step, self.at(step)) for step in steps]

    def updates_before(self, step: int) -> int:
        """Return the number of optimizer steps that the rollouts before `step` make."""
        phases = self.phases()
        ends = [*(start for start, _ in phases[1:]), step]
        return sum(
            max(0, min(end, step) - start) * phase.rl.minibatches
            for (start, phase), end in zip(phases, ends, strict=True)
        )

    def of_critic(self) -> Self:
        """Return the recipe of the critic: the same run with the critic as its model, which is
        trained whole."""
        critic, parallel = self.critic, self.parallel
        model: dict[str, Any] = {"head": "score", "lora": None}
        if critic.path is not None:
            model |= {"path": critic.path, "checkpoint": None}
        rate = {"learning_rate": critic.learning_rate}
        # A model with a score head has no MTP layers (m), wherever the policy's are placed.
        layout = parallel.pipeline_layout and parallel.pipeline_layout.replace("m", "")
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=model),
                "optimizer": self.optimizer.model_copy(update=rate),
                "parallel": parallel.model_copy(update={"pipeline_layout": layout}),
            }
        )


RESUMABLE = tuple(resumable_keys(Config))
"""Keys and sections that may differ when a run continues (`section.Resumable`)."""


Verb = Literal["rl", "sft", "reward-model", "sample"]


def verb_of(config: Config) -> Verb:
    """Return the verb that a recipe is for, from the sections that it sets."""
    if config.model.head == "score" or config.reward_model != RewardModelConfig():
        return "reward-model"
    if config.sft != SFTConfig():
        return "sft"
    return "sample" if config.sample != SampleConfig() else "rl"


def load(
    path: str | Path, overrides: dict[str, Any] | None = None, required: tuple[str, ...] = ()
) -> Config:
    """Read a recipe and apply `{"section.key": value}`.

    required: dotted keys that must have a value. Raises UserError naming every mistake."""
    tree = read_sections(Path(path))
    if "stages" in tree:
        raise UserError(f"recipe {path}: it has stages: run it with megatron-r1 pipeline {path}")
    return from_tree(_with_overrides(tree, overrides or {}), str(path), required)


def from_tree(tree: dict[str, Any], origin: str, required: tuple[str, ...] = ()) -> Config:
    """Build the configuration from a recipe's sections.

    origin: name of the recipe in errors. Raises UserError naming every mistake."""
    config = parse(tree, origin)
    missing = [key for key in required if not attrgetter(key)(config)]
    if missing:
        raise UserError(f"recipe {origin}: {', '.join(missing)} must be set")
    return config


def from_overrides(overrides: dict[str, Any]) -> Config:
    """Build the configuration of a command without a recipe: the defaults with
    `{"section.key": value}` applied. Raises UserError."""
    return parse(_with_overrides({}, overrides), "command line")


def parse(tree: dict[str, Any], origin: str = "config") -> Config:
    """Build the typed configuration from nested sections. Raises UserError naming each wrong key,
    its value and the remedy."""
    try:
        return Config.model_validate(tree)
    except ValidationError as failure:
        raise UserError(f"{origin}: {explain(failure, Config, known_keys())}") from None


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML with every key."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def known_keys() -> list[str]:
    """Return every `section.key`."""
    return [f"{name}.{key}" for name, section in Config() for key in type(section).model_fields]


def parse_overrides(options: list[str], switches: Collection[str] = ()) -> dict[str, Any]:
    """Parse `--rl.group_size 8 --data.task=sums` to {"rl.group_size": 8, "data.task": "sums"}.

    Values are YAML; a template such as `{problem}` is text. switches: keys that become true when no
    value follows. Raises UserError for an option without a value or without a section."""
    overrides: dict[str, Any] = {}
    pending = list(options)
    while pending:
        option = pending.pop(0)
        if not option.startswith("--"):
            raise UserError(f"unexpected argument {option}: settings are --section.key value")
        key, equals, value = option[2:].partition("=")
        if not equals:
            is_last = not pending or pending[0].startswith("--")
            if is_last and key in switches:
                overrides[key] = True
                continue
            if not pending:
                raise UserError(f"--{key} needs a value{did_you_mean(key, switches, '--{}')}")
            value = pending.pop(0)
        if "." not in key:
            # Compared with whole keys, most of which are longer: a looser cutoff than elsewhere.
            near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(f"unknown option --{key}: settings are --section.key value{hint}")
        overrides[key] = _value(value)
    return overrides


def take_section(overrides: Mapping[str, Any], settings: type[T]) -> tuple[T, dict[str, Any]]:
    """Return the settings of a verb that has sections of its own, and the other overrides.

    settings: the model of these sections. Raises UserError naming every mistake."""
    tree: dict[str, Any] = {}
    others = {}
    for key, value in overrides.items():
        if key.partition(".")[0] in settings.model_fields:
            put(tree, key.split("."), value, key)
        else:
            others[key] = value
    try:
        return settings.model_validate(tree), others
    except ValidationError as failure:
        known = [key for key, _ in keys_of(settings)]
        raise UserError(explain(failure, settings, known)) from None


def _with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in overrides.items():
        put(tree, dotted.split("."), value, dotted)
    return tree


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text  # no YAML, such as a template
    # `{problem}` is YAML, too: a mapping of a name to nothing, which no setting takes.
    return text if value and isinstance(value, dict) and ":" not in text else value
