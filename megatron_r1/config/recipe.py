"""A recipe: all sections together, read from YAML and the command line, with errors a person can
act on."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from megatron_r1.config.critic import CriticConfig
from megatron_r1.config.evaluation import EvalConfig
from megatron_r1.config.push import PushConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rl import PRESETS, RewardsConfig, RLConfig, RolloutConfig
from megatron_r1.config.run import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from megatron_r1.config.sample import SampleConfig
from megatron_r1.config.section import Section
from megatron_r1.config.teacher import TeacherConfig
from megatron_r1.config.training import FP8Config, OptimizerConfig, ParallelConfig, SFTConfig
from megatron_r1.config.yaml_text import read_yaml


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    push: PushConfig = PushConfig()
    rewards: RewardsConfig = RewardsConfig()
    rl: RLConfig = RLConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    critic: CriticConfig = CriticConfig()
    sample: SampleConfig = SampleConfig()
    fp8: FP8Config = FP8Config()

    @model_validator(mode="after")
    def _across_sections(self):
        outputs = self.rl.questions_per_rollout * self.rl.group_size
        if outputs % self.rl.minibatches:
            raise ValueError(
                f"rl.minibatches: {self.rl.minibatches} does not divide the {outputs} outputs of a "
                f"rollout ({self.rl.questions_per_rollout} questions x {self.rl.group_size}); "
                "choose a divisor"
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


RESUMABLE = (
    "run.folder",
    "run.steps",
    "run.log_samples",
    "push.transport",
    "push.memory_gib",
    "push.delta",
    "push.full_every",
    "push.timeout_seconds",
    "push.probes",
    "push.probe_tolerance",
    "run.hang_seconds",
    "run.on_hang",
    "run.max_trainer_restarts",
    "run.health_port",
    "rl.sample_log",
    "checkpoint",
    "eval",
    "rollout.engines",
    "rollout.placement",
    "rollout.hosts_port",
    "rollout.hosts_address",
    "rollout.host_silence_seconds",
    "rollout.hosts_per_engine",
    "rollout.tensor",
    "rollout.pipeline",
    "rollout.data",
    "rollout.expert_parallel",
    "rollout.colocated",
    "rollout.gpu_memory",
    "rollout.max_restarts",
    "rollout.unresponsive_seconds",
    "rollout.threads",
    "teacher.url",
    "teacher.engines",
    "teacher.tensor",
    "teacher.pipeline",
    "teacher.data",
    "teacher.expert_parallel",
    "teacher.gpu_memory",
    "teacher.max_num_seqs",
    "teacher.tokens_at_once",
    "teacher.threads",
    "teacher.max_restarts",
    "teacher.unresponsive_seconds",
    "rewards.options.helpful.url",
    "rewards.options.judge.url",
    "rewards.options.safety.url",
    "rewards.workers",
    "rewards.max_ungraded",
    "parallel",
)
"""Keys that may differ when a run continues: they change how long, how often or where, not what is
learned.
"""


def load(
    path: str | Path, overrides: dict[str, Any] | None = None, required: tuple[str, ...] = ()
) -> Config:
    """Read a recipe and apply `{"section.key": value}`; raises ValueError with one line per
    mistake.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"recipe {path}: must be a mapping of sections, found {type(tree).__name__}"
        )
    if "stages" in tree:
        raise ValueError(f"recipe {path}: it has stages: run it with megatron-r1 pipeline {path}")
    tree = {section: keys for section, keys in tree.items() if keys is not None}
    for dotted, value in (overrides or {}).items():
        _put(tree, dotted, value)
    return from_tree(tree, str(path), required)


def from_tree(tree: dict[str, Any], origin: str, required: tuple[str, ...] = ()) -> Config:
    """The configuration that sections of a recipe make, their preset filled in. origin: what errors
    call it. Raises ValueError with one line per mistake.
    """
    tree = dict(tree)
    preset = (
        (tree.get("rl") or {}).get("preset", "r1_zero")
        if isinstance(tree.get("rl", {}), dict)
        else "r1_zero"
    )
    for section, values in PRESETS.get(preset, {}).items():
        tree[section] = {**values, **(tree.get(section) or {})}
    config = parse(tree, origin)
    missing = [key for key in required if not _get(config, key)]
    if missing:
        raise ValueError(f"recipe {origin}: {', '.join(missing)} must be set")
    return config


def from_overrides(overrides: dict[str, Any]) -> Config:
    """The configuration of a command without a recipe: the defaults and `{"section.key": value}`;
    raises ValueError.
    """
    tree: dict[str, Any] = {}
    for dotted, value in overrides.items():
        _put(tree, dotted, value)
    return parse(tree, "command line")


def parse(tree: dict[str, Any], origin: str = "config") -> Config:
    """Build the typed configuration; raises ValueError naming each wrong key, its value and the
    remedy.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--{dotted}: {parent} is not a section")
    tree[leaf] = value


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = getattr(value, key)
    return value


def known_keys() -> list[str]:
    """Every `section.key` there is."""
    return [
        f"{s}.{k}"
        for s, field in Config.model_fields.items()
        for k in field.annotation.model_fields
    ]


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_hint(error['loc'])}"
    if error["type"] == "missing":
        return f"{key} must be set"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    quote = ""
    if error["type"] == "string_type" and isinstance(error.get("input"), dict | list):
        quote = (
            "; YAML takes that for more than a text: put it in double quotes, within the shell's"
        )
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error.get('input')!r}{quote}"


def _hint(location: tuple[str | int, ...]) -> str:
    """What an unknown key may have been meant to be: it is misspelt, or in a wrong section."""
    *parents, leaf = map(str, location)
    here = _keys_at(location[:-1])
    elsewhere = [name for name in known_keys() if name.rpartition(".")[2] == leaf]
    near = [".".join([*parents, name]) for name in difflib.get_close_matches(leaf, here, n=1)]
    for meant in near + elsewhere:
        return f"; did you mean {meant}?"
    return f"; {'.'.join(parents) or 'a recipe'} has {', '.join(here)}"


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """The keys of a section, or of a model within it, such as an entry of eval.benchmarks."""
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str):  # a number is an entry of a list, of the list's own type
            model = _model_within(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_within(annotation: Any) -> type[BaseModel]:
    """The model in a type such as list[Model] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(model for part in get_args(annotation) if (model := _model_within(part)))
