"""A recipe in miniature, and the list of what was changed and why."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config, dump, parse
from megatron_r1.config.teacher import TeacherEngines
from megatron_r1.data.prompt_tokenizer import TEMPLATES
from megatron_r1.engines.server.recipe_checks import num_experts
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.rehearse import layout, model, synthetic_data
from megatron_r1.rehearse.settings import RehearsalDevice
from megatron_r1.sample.filter_settings import FILTER_NAMES

ENGINE_AXES = ("tensor_parallel", "data_parallel", "pipeline_parallel", "engines")
"""Settings whose product is the ranks of all engines, in the order in which they become 1."""
RESPONSE_TOKENS = 24
"""Most tokens of a miniature's response."""
PROMPT_TOKENS = 208
"""Room for a prompt in the longest of our templates."""
QUESTION_TOKENS = 32
"""Room for a question."""
NUM_STEPS = 3
"""Fewest steps of a rehearsal: it is killed after the first, and continues to the last."""
LEARNING_RATE = 1e-3
"""Changes bf16 weights of 0.1 in one step, so that a push which delivers nothing is noticed."""
HANG_SECONDS = 600.0
"""The most of `run.hang_seconds`: a third of the default limit of a phase, so that the run's own
supervision says what hangs before the phase is ended."""
NUM_QUESTIONS = 16
"""Number of synthetic questions, two of which are held out: a choice. A rollout of more questions
draws some of them several times."""
PROBE_TOLERANCE = 0.1
"""The limit of `push.probe_tolerance` in bf16, where trainer and engine differ by 0.006 here, and
by 0.8 with another model's weights."""
FP8_PROBE_TOLERANCE = 0.3
"""The same where engines compute in FP8: their weights alone make 0.06, products of trainer and
engines 0.11."""

CPU_ROLLOUT = {"vllm": {}, "redundant_experts": 0}
"""Arguments of vLLM are of kernels, graphs and sizes of GPUs; its balancer needs GPUs."""
OMITTED_ARGUMENTS = ("all2all_backend", "kv_cache_dtype", "compilation_config", "moe_backend")
"""Arguments of vLLM that choose graphs, which a null GPU has not, or among kernels."""
IMITATED_EXCHANGES = ("allgather_reducescatter",)
"""Expert exchanges of vLLM that a null GPU executes: those by NCCL's collectives."""
IMITATED_CACHES = ("auto", "bfloat16")
BALANCER_OPTIONS = {"window_size": 8, "step_interval": 8}
"""vLLM's balancer counts tokens of experts in so many steps, and moves experts after as many: a
response of a miniature takes 24."""


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
        "run": _run(config, folder),
        "model": _model(folder, device),
        "data": _data(folder),
        "agents": {"environment": "", "harness": "", "verifiers": {}},
        "rollout": _rollout(config)
        | (
            _on_gpu(config, parallel.processes, num_experts(small_hf_config), device)
            if on_gpu
            else CPU_ROLLOUT
        ),
        "push": _push(config, on_gpu),
        "rewards": _rewards(config),
        "rl": _rl(config, replicas),
        "teacher": _teacher(config, folder),
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "min_learning_rate": min(config.optimizer.min_learning_rate, LEARNING_RATE),
            "warmup_updates": min(config.optimizer.warmup_updates, 1),
        },
        "parallel": parallel.model_dump()
        | {
            "tokens_per_microbatch": _tokens(config),
            "dispatcher": "alltoall",
            "offload_folder": None,
        },
        "checkpoint": {"every": 1},
        "eval": {"every": 0, "samples": 1, "benchmarks": []},
        "sft": _sft(config, folder, replicas),
        "reward_model": _reward_model(config, folder, replicas),
        "sample": _sample(config),
        "critic": {
            "path": config.critic.path and str(folder / "model"),
            "warmup_steps": min(config.critic.warmup_steps, 1),
        },
    }
    tree = config.model_dump()
    for section, values in changed_settings.items():
        tree[section] |= values
    small_config = parse(tree, "the recipe's miniature")
    return Miniature(
        small_config, small_hf_config, _changes(config, small_config, hf_config, small_hf_config)
    )


def write(miniature: Miniature, verb: str) -> Path:
    """Write the model, the data and the recipe of a miniature; return the recipe's path."""
    config, hf_config = miniature.config, miniature.hf_config
    folder = Path(config.run.folder).parent
    model.write_folder(Path(config.model.path), hf_config, seed=0)
    for teacher in config.teacher.sections.values():
        model.write_folder(Path(teacher.path), hf_config, seed=1)
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
    recipe.write_text(dump(config))
    return recipe


def _other_kinds(config: Config) -> list[str]:
    """Return the kinds of questions that a miniature has besides `synthetic_data.KIND`."""
    weights = [part.rl.kind_weights for _, part in config.schedule_parts()]
    has_named = any(synthetic_data.NAMED_KIND in kind_weights for kind_weights in weights)
    return [*model.reward_models(config.rewards.options), *[synthetic_data.NAMED_KIND] * has_named]


def _run(config: Config, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder / "run"),
        "steps": max(NUM_STEPS, 1 + len(config.rl.schedule)),
        "hang_seconds": min(config.run.hang_seconds, HANG_SECONDS) or HANG_SECONDS,
        "on_hang": "stop",
        "trackers": ["tensorboard"],
    }


def _model(folder: Path, device: RehearsalDevice) -> dict[str, Any]:
    return {
        "path": str(folder / "model"),
        "checkpoint": None,
        "attention_backend": "auto",
        # Those of Transformer Engine are kernels.
        "fusions": ["gradient_accumulation"] if device == "null-gpu" else None,
    }


def _data(folder: Path) -> dict[str, Any]:
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


def _rollout(config: Config) -> dict[str, Any]:
    rollout = config.rollout
    hosts = min(rollout.hosts_per_engine, layout.MAX_PARTS)
    return {
        "engines": min(rollout.engines, layout.MAX_PARTS),
        "tensor_parallel": min(rollout.tensor_parallel, layout.MAX_PARTS),
        "data_parallel": min(rollout.data_parallel, layout.MAX_PARTS),
        "pipeline_parallel": min(rollout.pipeline_parallel, layout.MAX_PARTS),
        "hosts_per_engine": hosts,
        "hosts_address": "127.0.0.1" if rollout.placement == "hosts" else None,
        "hosts_port": 0,
        "max_response_tokens": _response_tokens(config, rollout.max_response_tokens),
        "max_model_len": _max_model_len(config),
        "max_num_seqs": min(rollout.max_num_seqs, 16),
        "gpu_memory": None,
        "threads": 1,
        "start_timeout_seconds": 1200.0,
        "host_silence_seconds": 120.0,
    }


def _max_model_len(config: Config) -> int:
    """Return the most tokens of a prompt with its response: in a template of the recipe's own, at
    most one for each byte."""
    templates = config.data.template, config.reward_model.template or ""
    template_bytes = max(len(text.encode()) for text in templates if text not in TEMPLATES)
    return max(PROMPT_TOKENS, template_bytes + QUESTION_TOKENS) + RESPONSE_TOKENS


def _response_tokens(config: Config, tokens: int) -> int:
    """Return the miniature of a limit: the longest of the schedule is `RESPONSE_TOKENS`."""
    longest = max(part.rollout.max_response_tokens for _, part in config.schedule_parts())
    return max(1, RESPONSE_TOKENS * tokens // longest)


def _schedule(config: Config) -> list[dict[str, Any]]:
    """Return the recipe's changes of settings, one at each step from the second."""
    shrunk: dict[str, Callable[[Config, Any], Any]] = {
        "rollout.max_response_tokens": _response_tokens,
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


def _on_gpu(config: Config, num_gpus: int, experts: int, device: RehearsalDevice) -> dict[str, Any]:
    """Return what differs for engines on GPUs: the recipe's share of them, its arguments of vLLM,
    and no more ranks than trainer ranks have GPUs.

    Args:
        config: the recipe.
        num_gpus: the trainer ranks of the miniature.
        experts: the routed experts of a layer of its model.
        device: "gpu" or "null-gpu"."""
    small_rollout, sizes = _rollout(config), {}
    while math.prod(small_rollout[axis] for axis in ENGINE_AXES) > num_gpus:
        # Experts are spread by the data axis, too; several engines are what a push is most for.
        axes = [axis for axis in ENGINE_AXES if small_rollout[axis] > 1]
        kept_axis = (
            "data_parallel" if config.rollout.expert_parallel and "data_parallel" in axes else ""
        )
        left_out = next((axis for axis in axes if axis != kept_axis), axes[0])
        small_rollout[left_out] = sizes[left_out] = 1
    hosts = min(small_rollout["hosts_per_engine"], small_rollout["data_parallel"])
    num_copies = layout.redundant_experts(config.rollout.model_copy(update=small_rollout), experts)
    return {
        "gpu_memory": config.rollout.gpu_memory,
        **sizes,
        "hosts_per_engine": hosts,
        "redundant_experts": num_copies,
        "vllm": _vllm(config, num_copies, device),
    }


def _vllm(config: Config, num_copies: int, device: RehearsalDevice) -> dict[str, Any]:
    """Return the recipe's arguments of vLLM: on a null GPU without kernels that it does not
    imitate, prompts in two parts where the recipe divides them, and experts that are moved."""
    arguments = dict(config.rollout.vllm)
    if device == "null-gpu":
        arguments = {
            name: value for name, value in arguments.items() if name not in OMITTED_ARGUMENTS
        }
        if config.rollout.vllm.get("all2all_backend") in IMITATED_EXCHANGES:
            arguments["all2all_backend"] = config.rollout.vllm["all2all_backend"]
        if config.rollout.vllm.get("kv_cache_dtype") in IMITATED_CACHES:
            arguments["kv_cache_dtype"] = config.rollout.vllm["kv_cache_dtype"]
    if "max_num_batched_tokens" in arguments:
        tokens = min(arguments["max_num_batched_tokens"], _max_model_len(config) // 2)
        arguments["max_num_batched_tokens"] = tokens
    if num_copies:
        arguments["eplb_config"] = {**arguments.get("eplb_config", {}), **BALANCER_OPTIONS}
    else:
        arguments.pop("eplb_config", None)
    return arguments


def _push(config: Config, on_gpu: bool) -> dict[str, Any]:
    transport = config.push.transport
    is_exact = config.model.dtype == config.rollout.dtype == "float32"
    tolerance = FP8_PROBE_TOLERANCE if config.push.fp8 else PROBE_TOLERANCE
    return {
        "transport": (not on_gpu and TRANSPORTS[transport].without_gpu) or transport,
        "probe_tolerance": None if is_exact else tolerance,  # 0.001 in float32
    }


def _rewards(config: Config) -> dict[str, Any]:
    rewards, left_out = config.rewards.model_dump(), _judges(config)
    options = {
        kind: kind_options
        for kind, kind_options in rewards["options"].items()
        if kind not in left_out
    }
    return {"options": options, "weights": _weights(config, rewards["weights"]), "workers": 1}


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


def _rl(config: Config, data_parallel: int) -> dict[str, Any]:
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


def _teacher(config: Config, folder: Path) -> dict[str, Any]:
    if not config.teacher.path:
        return {}
    by_source = {
        source: teacher.model_dump() | _teacher_engines(teacher, folder / f"teacher-{number}")
        for number, (source, teacher) in enumerate(config.teacher.by_source.items())
    }
    return _teacher_engines(config.teacher, folder / "teacher") | {"by_source": by_source}


def _teacher_engines(teacher: TeacherEngines, folder: Path) -> dict[str, Any]:
    """Return the settings that differ for one teacher, with its model in `folder`."""
    return {
        "path": str(folder),
        "url": [],
        "engines": 1,
        "tensor_parallel": min(teacher.tensor_parallel, layout.MAX_PARTS),
        "threads": 1,
        "start_timeout_seconds": 1200.0,
    }


def _tokens(config: Config) -> int:
    """Return the limit of a micro-batch: the longest sample times as much as in the recipe, and no
    more tokens than there."""
    rollout = config.rollout
    longest = rollout.max_model_len or rollout.max_response_tokens
    tokens = config.parallel.microbatch_tokens
    return max(1, min(tokens, tokens * _max_model_len(config) // longest))


def _sft(config: Config, folder: Path, data_parallel: int) -> dict[str, Any]:
    if not config.sft.data:
        return {}
    parts: Any = str(folder / "examples.jsonl")
    if isinstance(config.sft.data, list):
        parts = [{"path": parts, "count": 2 * NUM_QUESTIONS} for _ in config.sft.data]
    return {"data": parts, "epochs": None, "batch_size": 4 * data_parallel}


def _reward_model(config: Config, folder: Path, data_parallel: int) -> dict[str, Any]:
    if not config.reward_model.data:
        return {}
    return {
        "data": str(folder / "preferences.jsonl"),
        "epochs": None,
        "batch_size": 4 * data_parallel,
        "max_tokens": _max_model_len(config) if config.reward_model.max_tokens else None,
    }


def _sample(config: Config) -> dict[str, Any]:
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


def _changes(
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
