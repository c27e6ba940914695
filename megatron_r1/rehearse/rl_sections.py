"""The sections `rl` and `rewards` in miniature."""

from collections.abc import Callable
from typing import Any

from megatron_r1.config import Config
from megatron_r1.rehearse import layout, model, synthetic_data
from megatron_r1.rehearse.engine_sections import response_tokens


def rl_section(config: Config, data_parallel: int) -> dict[str, Any]:
    """Return the settings of `rl` that differ.

    Args:
        config: the recipe.
        data_parallel: the trainer's replicas."""
    rl = config.rl
    group = min(rl.group_size, 4)
    max_minibatches = max(
        _minibatches(config, part.rl.minibatches) for _, part in config.schedule_parts()
    )
    # Every replica has a sample in every mini-batch.
    responses = max_minibatches * max(data_parallel, group) * (2 if rl.group_size == 1 else 1)
    return {
        "group_size": group,
        "minibatches": _minibatches(config, rl.minibatches),
        "prompts_per_rollout": -(-responses // group),
        "kind_weights": _kind_weights(config, rl.kind_weights),
        "reference_refresh": min(rl.reference_refresh, 2),
        "staleness": min(rl.staleness, 2),
        "schedule": _schedule(config),
    }


def rewards_section(config: Config) -> dict[str, Any]:
    """Return the settings of `rewards` that differ: no judge, and one worker."""
    rewards, left_out = config.rewards.model_dump(), _judges(config)
    options = {
        kind: kind_options
        for kind, kind_options in rewards["options"].items()
        if kind not in left_out
    }
    return {"options": options, "weights": _weights(config, rewards["weights"]), "workers": 1}


def _schedule(config: Config) -> list[dict[str, Any]]:
    """Return the recipe's changes of settings, one at each step from the second."""
    shrunk: dict[str, Callable[[Config, Any], Any]] = {
        "rollout.max_response_tokens": response_tokens,
        "rl.minibatches": _minibatches,
        "rewards.weights": _weights,
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


def _minibatches(config: Config, number: int) -> int:
    """Return the miniature of a number of mini-batches: the most of the schedule are two."""
    max_minibatches = max(part.rl.minibatches for _, part in config.schedule_parts())
    return max(1, min(max_minibatches, layout.MAX_PARTS) * number // max_minibatches)


def _kind_weights(config: Config, weights: dict[str, float]) -> dict[str, float]:
    """Return the weights of the kinds of questions that a miniature has."""
    model_kinds = model.reward_models(config.rewards.options)
    other_weights = [weight for kind, weight in weights.items() if kind not in model_kinds]
    stands_for_them = {synthetic_data.NAMED_KIND: max(other_weights)} if other_weights else {}
    return {
        kind: weight for kind, weight in weights.items() if kind in model_kinds
    } | stands_for_them


def _judges(config: Config) -> set[str]:
    """Return the rewards of served models that a miniature does not have."""
    options = config.rewards.options
    kinds = {kind for kind, values in options.items() if "url" in values}
    return kinds - model.reward_models(options).keys()


def _weights(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of the terms of the reward that a miniature has."""
    left_out = _judges(config)
    return {kind: weight for kind, weight in weights.items() if kind not in left_out} or {
        "accuracy": 1
    }
