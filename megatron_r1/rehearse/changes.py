"""The list of what a recipe's miniature changes, with the reasons."""

from typing import NamedTuple

from megatron_r1.config import Config
from megatron_r1.models.hf_config import HFConfig


class Change(NamedTuple):
    """A setting or size that differs from the recipe's."""

    key: str
    recipe: str
    miniature: str
    reason: str


def list_changes(
    config: Config, small_config: Config, hf_config: HFConfig, small_hf_config: HFConfig
) -> list[Change]:
    """Return every setting and size that differs, with the reason where it is not size alone.

    Args:
        config: the recipe.
        small_config: the miniature's recipe.
        hf_config: the model's `config.json`.
        small_hf_config: that of the miniature's model."""
    before, after = config.model_dump(), small_config.model_dump()
    compared = [
        (f"{section}.{key}", value, after[section][key])
        for section, values in before.items()
        for key, value in values.items()
    ]
    compared += [
        (f"config.json {key}", value, small_hf_config.get(key)) for key, value in hf_config.items()
    ]
    return [
        Change(key, _text(old), _text(new), REASONS.get(key, "size"))
        for key, old, new in compared
        if old != new
    ]


REASONS = {
    **dict.fromkeys(
        ("push.transport", "model.attention_backend", "model.fusions", "parallel.dispatcher"),
        "no GPU here",
    ),
    "rollout.redundant_experts": "one on each rank; none without GPUs",
    "rollout.vllm": "kernels and graphs of GPUs, sizes, a balancer that moves experts",
    **dict.fromkeys(
        ("agents.environment", "agents.harness", "agents.verifiers"), "random weights call no tool"
    ),
    "rl.kind_weights": "synthetic questions",
    **dict.fromkeys(("rewards.options", "rewards.weights"), "no judge is served"),
    "parallel.offload_folder": "this host's own",
    "sample.filters": "random text passes none",
    "sample.keep": "random text is rarely right",
    "sample.judge": "a rule judges, no served model",
    "sample.server": "the miniature answers",
    "teacher.url": "the run starts the teacher itself",
    "teacher.by_source": "small models of the same number",
    "optimizer.learning_rate": "bf16 weights must change in one step",
    "model.checkpoint": "random weights",
    "data.task": "synthetic questions",
    "data.path": "synthetic questions",
}


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
