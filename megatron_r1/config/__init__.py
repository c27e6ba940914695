"""Every setting of a run: typed, defaulted, with its unit and source.

A recipe is a YAML file of sections; the command line overrides single keys (`--rl.group_size 8`).
The defaults of `rl`, `optimizer` and `rollout` are DeepSeek-R1-Zero's (arXiv 2501.12948 v2, section
2 and supplement B); a recipe says only where it differs. Unknown keys are errors that name the
nearest right one."""

from megatron_r1.config.agents import AgentsConfig, VerifiersConfig
from megatron_r1.config.checkpoint import CheckpointConfig
from megatron_r1.config.critic import CriticConfig
from megatron_r1.config.data import DataConfig
from megatron_r1.config.fp8 import FP8Config
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.recipe import RESUMABLE, Config, Verb, infer_verb, known_keys
from megatron_r1.config.recipe_files import (
    dump_recipe,
    from_overrides,
    from_tree,
    load_recipe,
    parse_recipe,
)
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rewards import RewardsConfig
from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.sample import SampleConfig
from megatron_r1.config.sft import SFTConfig
from megatron_r1.config.teacher import TeacherConfig
