"""A recipe in miniature, with its model, its data and the list of what it changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config, dump_recipe, parse_recipe
from megatron_r1.engines.server.recipe_checks import num_experts
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.rehearse import layout, model, served_reward_models, synthetic_data
from megatron_r1.rehearse.engine_sections import (
    CPU_ROLLOUT,
    RESPONSE_TOKENS,
    miniature_model_len,
    rollout_on_gpus,
    small_rollout_settings,
    small_teacher_settings,
)
from megatron_r1.rehearse.recipe_sections import (
    NUM_QUESTIONS,
    data_section,
    reward_model_section,
    rewards_section,
    rl_section,
    sample_section,
    sft_section,
)
from megatron_r1.rehearse.settings import RehearsalDevice

NUM_STEPS = 3
"""Fewest steps of a rehearsal: it is killed after the first, and continues to the last."""
LEARNING_RATE = 1e-3
"""Changes bf16 weights of 0.1 in one step, so that a push which delivers nothing is noticed."""
HANG_SECONDS = 600.0
"""The most of `run.hang_seconds`: a third of the default limit of a phase, so that the run's own
supervision says what hangs before the phase is ended."""
PROBE_TOLERANCE = 0.1
"""The limit of `push.probe_tolerance` in bf16, where trainer and engine differ by 0.006 here, and
by 0.8 with another model's weights."""
FP8_PROBE_TOLERANCE = 0.3
"""The same where engines compute in FP8: their weights alone make 0.06, products of trainer and
engines 0.11."""


class Change(NamedTuple):
    """A setting or size that differs from the recipe's."""

    key: str
    recipe: str
    miniature: str
    reason: str


@dataclass(frozen=True)
class Miniature:
    """A recipe's miniature.

    Attributes:
        config: its settings.
        hf_config: its model.
        changes: everything that is not as in the recipe."""

    config: Config
    hf_config: HFConfig
    changes: list[Change]


def make_miniature(
    config: Config,
    hf_config: HFConfig,
    folder: Path,
    max_ranks: int,
    *,
    device: RehearsalDevice = "cpu",
) -> Miniature:
    """Return the miniature of a recipe.

    Args:
        config: the recipe.
        hf_config: the model's config.json.
        folder: the folder that the miniature runs in.
        max_ranks: the most trainer ranks.
        device: on GPUs axes are left out for `max_ranks`, as a machine has few, and memory for few
            null GPUs."""
    on_gpu = device != "cpu"
    parallel = layout.shrink_layout(config.parallel, max_ranks, leaves_out=on_gpu)
    replicas = parallel.data_parallel_size(parallel.processes)
    small_hf_config = model.shrink_config(hf_config, layout.num_layers(parallel), config.push.fp8)
    changed_settings: dict[str, Any] = {
        "run": _run_settings(config, folder),
        "model": _model_settings(config, folder, device),
        "data": data_section(folder),
        "agents": {"environment": "", "harness": "", "verifiers": {}},
        "rollout": small_rollout_settings(config)
        | (
            rollout_on_gpus(config, parallel.processes, num_experts(small_hf_config), device)
            if on_gpu
            else CPU_ROLLOUT
        ),
        "push": _push_settings(config, on_gpu),
        "rewards": rewards_section(config),
        "rl": rl_section(config, replicas),
        "teacher": small_teacher_settings(config, folder),
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "min_learning_rate": min(config.optimizer.min_learning_rate, LEARNING_RATE),
            "warmup_updates": min(config.optimizer.warmup_updates, 1),
        },
        "parallel": parallel.model_dump()
        | {
            "tokens_per_microbatch": _microbatch_tokens(config),
            "dispatcher": "alltoall",
            "offload_folder": None,
        },
        "checkpoint": {"every": 1},
        "eval": {"every": 0, "samples": 1, "benchmarks": []},
        "sft": sft_section(config, folder, replicas),
        "reward_model": reward_model_section(config, folder, replicas),
        "sample": sample_section(config),
        "critic": {
            "path": config.critic.path and str(folder / "model"),
            "warmup_steps": min(config.critic.warmup_steps, 1),
        },
    }
    tree = config.model_dump()
    for section, values in changed_settings.items():
        tree[section] |= values
    small_config = parse_recipe(tree, "the recipe's miniature")
    return Miniature(
        small_config,
        small_hf_config,
        describe_miniature_changes(config, small_config, hf_config, small_hf_config),
    )


def write_miniature(miniature: Miniature, verb: str) -> Path:
    """Write the model, the data and the recipe of a miniature; return the recipe's path."""
    config, hf_config = miniature.config, miniature.hf_config
    folder = Path(config.run.folder).parent
    model.write_random_model_folder(Path(config.model.path), hf_config, seed=0)
    for teacher in config.teacher.sections.values():
        model.write_random_model_folder(Path(teacher.path), hf_config, seed=1)
    kinds = _other_kinds(config) if verb == "rl" else []
    sources = list(config.teacher.by_source)
    count = max(NUM_QUESTIONS, 4 * (len(sources) + 1))  # some of each are held out
    synthetic_data.write_questions(folder / "questions.jsonl", count, kinds, sources)
    synthetic_data.write_examples(
        folder / "examples.jsonl", 4 * NUM_QUESTIONS, RESPONSE_TOKENS // 2
    )
    if verb == "reward-model":
        kind = config.reward_model.kind
        synthetic_data.write_preferences(folder / "preferences.jsonl", 4 * NUM_QUESTIONS, kind)
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    return recipe


def _other_kinds(config: Config) -> list[str]:
    """Return the kinds of questions that a miniature has besides `synthetic_data.KIND`."""
    weights = [part.rl.kind_weights for _, part in config.schedule_parts()]
    has_named = any(synthetic_data.NAMED_KIND in kind_weights for kind_weights in weights)
    return [
        *served_reward_models.reward_models(config.rewards.options),
        *[synthetic_data.NAMED_KIND] * has_named,
    ]


def _run_settings(config: Config, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder / "run"),
        "steps": max(NUM_STEPS, 1 + len(config.rl.schedule)),
        "hang_seconds": min(config.run.hang_seconds, HANG_SECONDS) or HANG_SECONDS,
        "on_hang": "stop",
        "trackers": ["tensorboard"],
    }


def _model_settings(config: Config, folder: Path, device: RehearsalDevice) -> dict[str, Any]:
    return {
        "path": str(folder / "model"),
        "checkpoint": None,
        "attention_backend": config.model.attention_backend if device == "gpu" else "auto",
        # Those of Transformer Engine are kernels.
        "fusions": ["gradient_accumulation"] if device == "null-gpu" else None,
    }


def _push_settings(config: Config, on_gpu: bool) -> dict[str, Any]:
    transport = config.push.transport
    is_exact = config.model.dtype == config.rollout.dtype == "float32"
    tolerance = FP8_PROBE_TOLERANCE if config.push.fp8 else PROBE_TOLERANCE
    return {
        "transport": (not on_gpu and TRANSPORTS[transport].without_gpu) or transport,
        "probe_tolerance": None if is_exact else tolerance,  # 0.001 in float32
    }


def _microbatch_tokens(config: Config) -> int:
    """Return the limit of a micro-batch: the longest sample times as much as in the recipe, and no
    more tokens than there."""
    rollout = config.rollout
    longest = rollout.max_model_len or rollout.max_response_tokens
    tokens = config.parallel.microbatch_tokens
    return max(1, min(tokens, tokens * miniature_model_len(config) // longest))


def describe_miniature_changes(
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
        Change(key, _short_text(old), _short_text(new), REASONS.get(key, "size"))
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


def _short_text(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
