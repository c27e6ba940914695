"""Sections of a recipe in miniature: `rl` and `rewards`, and those that name data, `data`, `sft`,
`reward_model` and `sample`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.rehearse import layout, served_reward_models, synthetic_data
from megatron_r1.rehearse.engine_sections import miniature_model_len, response_tokens
from megatron_r1.sample.filter_settings import FILTER_NAMES

NUM_QUESTIONS = 16
"""Number of synthetic questions, two of which are held out: a choice. A rollout of more questions
draws some of them several times."""


def rl_section(config: Config, data_parallel: int) -> dict[str, Any]:
    """Return the settings of `rl` that differ.

    Args:
        config: the recipe.
        data_parallel: the trainer's replicas."""
    rl = config.rl
    group = min(rl.group_size, 4)
    max_minibatches = max(
        _shrink_minibatches(config, part.rl.minibatches) for _, part in config.schedule_parts()
    )
    # Every replica has a sample in every mini-batch.
    responses = max_minibatches * max(data_parallel, group) * (2 if rl.group_size == 1 else 1)
    return {
        "group_size": group,
        "minibatches": _shrink_minibatches(config, rl.minibatches),
        "prompts_per_rollout": -(-responses // group),
        "kind_weights": _kind_weights(config, rl.kind_weights),
        "reference_refresh": min(rl.reference_refresh, 2),
        "staleness": min(rl.staleness, 2),
        "schedule": _schedule_entries(config),
    }


def rewards_section(config: Config) -> dict[str, Any]:
    """Return the settings of `rewards` that differ: no judge, and one worker."""
    rewards, left_out = config.rewards.model_dump(), _left_out_judges(config)
    options = {
        kind: kind_options
        for kind, kind_options in rewards["options"].items()
        if kind not in left_out
    }
    return {"options": options, "weights": _term_weights(config, rewards["weights"]), "workers": 1}


def data_section(folder: Path) -> dict[str, Any]:
    """Return the section `data`, whose questions are in `folder`."""
    return {
        "path": str(folder / "questions.jsonl"),
        "heldout_path": None,
        "task": None,
        "parameters": {},
        "kind": None,
        "columns": None,
        "where": {},
        "num_train": None,
        "num_heldout": 2,
        "heldout_fraction": 0.1,
    }


def sft_section(config: Config, folder: Path, data_parallel: int) -> dict[str, Any]:
    """Return the settings of `sft` that differ; {} where the recipe has no examples.

    Args:
        config: the recipe.
        folder: the folder of the synthetic examples.
        data_parallel: the trainer's replicas."""
    if not config.sft.data:
        return {}
    parts: Any = str(folder / "examples.jsonl")
    if isinstance(config.sft.data, list):
        parts = [{"path": parts, "count": 2 * NUM_QUESTIONS} for _ in config.sft.data]
    return {"data": parts, "epochs": None, "batch_size": 4 * data_parallel}


def reward_model_section(config: Config, folder: Path, data_parallel: int) -> dict[str, Any]:
    """Return the settings of `reward_model` that differ; {} where the recipe has no rows for it.

    Args:
        config: the recipe.
        folder: the folder of the synthetic rows.
        data_parallel: the trainer's replicas."""
    if not config.reward_model.data:
        return {}
    return {
        "data": str(folder / "preferences.jsonl"),
        "epochs": None,
        "batch_size": 4 * data_parallel,
        "max_tokens": miniature_model_len(config) if config.reward_model.max_tokens else None,
    }


def sample_section(config: Config) -> dict[str, Any]:
    """Return the settings of `sample` that differ: it reads no files and filters nothing."""
    sample = config.sample
    judges = {"pairs": "compare", "labels": "is_safe"}
    changed_settings: dict[str, Any] = {
        "samples": min(sample.samples, 4),
        "server": None,
        "shots": None,
        "num_shots": None,
        "decontaminate": [],
        "rewrite": None,
        # Random text has no form, so that nothing would be kept.
        "filters": dict.fromkeys(FILTER_NAMES, False),
        "pairs": sample.pairs.model_dump() | {"max_length_bias": None},
    }
    if sample.is_graded:
        limits = {"min_accuracy": 0.0, "min_reward": None}
        limits |= {"min_pass_rate": None, "max_pass_rate": None}
        changed_settings["keep"] = sample.keep.model_dump() | limits
    if sample.output in judges:
        changed_settings["judge"] = f"{synthetic_data.__name__}:{judges[sample.output]}"
    return changed_settings


def _schedule_entries(config: Config) -> list[dict[str, Any]]:
    """Return the recipe's changes of settings, one at each step from the second."""
    shrunk: dict[str, Callable[[Config, Any], Any]] = {
        "rollout.max_response_tokens": response_tokens,
        "rl.minibatches": _shrink_minibatches,
        "rewards.weights": _term_weights,
        "rl.kind_weights": _kind_weights,
    }
    entries: list[dict[str, Any]] = []
    for step, entry in enumerate(config.rl.schedule, start=2):
        changes = {
            key: shrunk[key](config, value) if key in shrunk else value
            for key, value in entry.changes.items()
            if key not in ("rl.prompts_per_rollout", "rl.group_size")
        }
        if changes:
            entries.append({"from_step": step, **changes})
    return entries


def _shrink_minibatches(config: Config, number: int) -> int:
    """Return the miniature of a number of mini-batches: the most of the schedule are two."""
    max_minibatches = max(part.rl.minibatches for _, part in config.schedule_parts())
    return max(1, min(max_minibatches, layout.MAX_PARTS) * number // max_minibatches)


def _kind_weights(config: Config, weights: dict[str, float]) -> dict[str, float]:
    """Return the weights of the kinds of questions that a miniature has."""
    model_kinds = served_reward_models.reward_models(config.rewards.options)
    other_weights = [weight for kind, weight in weights.items() if kind not in model_kinds]
    stands_for_them = {synthetic_data.NAMED_KIND: max(other_weights)} if other_weights else {}
    return {
        kind: weight for kind, weight in weights.items() if kind in model_kinds
    } | stands_for_them


def _left_out_judges(config: Config) -> set[str]:
    """Return the rewards of served models that a miniature does not have."""
    options = config.rewards.options
    kinds = {kind for kind, values in options.items() if "url" in values}
    return kinds - served_reward_models.reward_models(options).keys()


def _term_weights(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of the terms of the reward that a miniature has."""
    left_out = _left_out_judges(config)
    return {kind: weight for kind, weight in weights.items() if kind not in left_out} or {
        "accuracy": 1
    }
