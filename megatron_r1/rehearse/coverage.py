"""The table of the phases that a rehearsal has exercised, and of those that it has not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.players import find_player
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.rehearse import null_gpu
from megatron_r1.rehearse.miniature import Change
from megatron_r1.rehearse.phases import PhaseResult
from megatron_r1.rehearse.served_reward_models import reward_models
from megatron_r1.rehearse.settings import RehearsalDevice


class StructureRow(NamedTuple):
    """A part of a recipe's structure.

    Attributes:
        what: the setting, or a part of the structure in words.
        recipe: its value in the recipe.
        miniature: its value in the miniature.
        exercised: `YES`, or why not."""

    what: str
    recipe: str
    miniature: str
    exercised: str


YES = "yes"


SIZE_SETTINGS = {
    "parallel": (
        "processes",
        "tensor",
        "context",
        "expert",
        "expert_tensor",
        "pipeline",
        "virtual_pipeline",
        "pipeline_layout",
        "recompute",
        "overlap_expert_exchange",
        "overlap_param_gather",
    ),
    "fp8": ("recipe",),
    "rollout": (
        "engines",
        "tensor_parallel",
        "data_parallel",
        "pipeline_parallel",
        "expert_parallel",
        "redundant_experts",
        "placement",
        "hosts_per_engine",
        "colocated",
        "max_response_tokens",
    ),
    "push": ("transport", "fp8"),
    "rl": (
        "algorithm",
        "group_size",
        "minibatches",
        "staleness",
        "routing_replay",
        "dynamic_sampling",
    ),
}
"""Settings that give a run its structure; those at 1, none or false have nothing to exercise."""
SECTIONS_BY_VERB = {
    "rl": ("parallel", "fp8", "rollout", "push", "rl"),
    "sft": ("parallel", "fp8"),
    "reward-model": ("parallel", "fp8"),
    "sample": ("rollout",),
}
LIMITATIONS = {
    "rollout.colocated": "in turns, but no GPU memory is freed",
    "rollout.max_response_tokens": "no: short responses",
    "parallel.processes": "no: the size of the world",
    "rollout.redundant_experts": "no: needs a GPU",
    "fp8.recipe": "emulated",
}


ON_GPU = {key: LIMITATIONS[key] for key in ("rollout.max_response_tokens", "parallel.processes")}
ON_NULL_GPU = ON_GPU | {"fp8.recipe": "yes, by operators of the host"}


def structure_rows(
    recipe: Config,
    hf_config: HFConfig,
    small_config: Config,
    verb: str,
    *,
    device: RehearsalDevice = "cpu",
) -> list[StructureRow]:
    """Return a row for each part of the recipe's structure that its verb uses.

    Args:
        recipe: the settings of the full run.
        hf_config: the model's config.json.
        small_config: the miniature.
        verb: the recipe's verb.
        device: where the miniature runs."""
    not_here = {"cpu": LIMITATIONS, "gpu": ON_GPU, "null-gpu": ON_NULL_GPU}[device]
    rows: list[StructureRow] = []
    for section in SECTIONS_BY_VERB[verb]:
        before, after = getattr(recipe, section), getattr(small_config, section)
        for key in SIZE_SETTINGS[section]:
            old, new = getattr(before, key), getattr(after, key)
            if _is_used(old):
                exercised = not_here.get(f"{section}.{key}") or _exercise_verdict(old, new)
                rows.append(StructureRow(f"{section}.{key}", str(old), str(new), exercised))
    if verb in ("rl", "sample"):
        rows += _engine_rows(recipe, small_config)
    if verb != "sample":
        rows += _trainer_rows(recipe, hf_config, small_config, verb, device)
    return rows + _omitted_rows(recipe, small_config, verb)


def _engine_rows(recipe: Config, small_config: Config) -> list[StructureRow]:
    """Return rows for the drafts of engines and their arguments of vLLM."""
    rows = []
    if recipe.rollout.speculative.method != "none":
        drafts = recipe.rollout.speculative, small_config.rollout.speculative
        before, after = (f"{draft.method}, {draft.tokens} tokens" for draft in drafts)
        rows.append(StructureRow("rollout.speculative", before, after, YES))
    for argument, small_argument in _pair_arguments(recipe.rollout.vllm, small_config.rollout.vllm):
        cells = (
            (small_argument, YES)
            if small_argument
            else ("—", "no: needs a GPU; vLLM's parser has read it")
        )
        rows.append(StructureRow("rollout.vllm", argument, *cells))
    return rows


def _trainer_rows(
    recipe: Config, hf_config: HFConfig, small_config: Config, verb: str, device: RehearsalDevice
) -> list[StructureRow]:
    """Return rows for the trainer: replicas, what is trained, its offloading, layers, memory.

    Args:
        recipe: the settings of the full run.
        hf_config: the model's config.json.
        small_config: the miniature.
        verb: the recipe's verb.
        device: where the miniature runs."""
    rows = []
    old, new = (p.data_parallel_size(p.processes) for p in (recipe.parallel, small_config.parallel))
    if old > 1:
        rows.append(
            StructureRow("replicas of the model", str(old), str(new), _exercise_verdict(old, new))
        )
    if hf_config.get("num_nextn_predict_layers") and verb != "reward-model":
        rows.append(StructureRow("model.mtp", recipe.model.mtp, small_config.model.mtp, YES))
    if recipe.model.lora is not None:
        rank = f"rank {recipe.model.lora.rank}"
        rows.append(StructureRow("model.lora", rank, rank, YES))
    if recipe.parallel.optimizer_offload:
        rows.append(
            StructureRow("parallel.optimizer_offload", "to the host", "—", "no: needs a GPU")
        )
    if (place := recipe.parallel.offload_between_phases) != "none":
        rows.append(StructureRow("parallel.offload_between_phases", place, place, YES))
    if recipe.parallel.dispatcher != "alltoall":
        rows.append(StructureRow("parallel.dispatcher", "DeepEP", "alltoall", "no: needs a GPU"))
    layers, memory = {
        "cpu": (
            ("Megatron-Core's own", "no: needs a GPU"),
            ("—", "no: megatron-r1 plan computes it"),
        ),
        "gpu": (("the same", YES), ("the whole GPU", "no: of a small model")),
        "null-gpu": (
            ("the same, by operators of the host", YES),
            (f"{null_gpu.NULL_GPU_GIB:g} GiB of a null GPU", YES),
        ),
    }[device]
    rows.append(StructureRow("layers", "Transformer Engine", *layers))
    rows.append(StructureRow("memory", "of a GPU", *memory))
    return rows


def _omitted_rows(recipe: Config, small_config: Config, verb: str) -> list[StructureRow]:
    """Return rows for the served models and the functions that a recipe names."""
    rows = []
    if verb in ("rl", "sample"):
        for name, values in recipe.rewards.options.items():
            if "url" in values:
                is_served = verb == "rl" and name in reward_models(recipe.rewards.options)
                cells = ("served", YES) if is_served else ("—", "no: none is served")
                rows.append(StructureRow(f"rewards.options.{name}", "served", *cells))
    if verb == "sample":
        if recipe.sample.judge != small_config.sample.judge:
            rows.append(
                StructureRow("sample.judge", recipe.sample.judge, "a rule", "no: none is served")
            )
        if recipe.sample.rewrite:
            rows.append(
                StructureRow("sample.rewrite", recipe.sample.rewrite, "—", "no: random text")
            )
    if verb == "rl":
        if named_player := find_player(recipe):
            key, player = named_player
            rows.append(StructureRow(key, str(player), "—", "no: random weights call no tool"))
        rows += [
            StructureRow(f"{key}.url", "served", "started by the run", "no: none is served")
            for key, teacher in recipe.teacher.sections.items()
            if teacher.url
        ]
    return rows


def _pair_arguments(
    recipe_arguments: Mapping[str, Any], small_arguments: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return each argument of vLLM, and what a miniature has of it, "" for nothing."""
    return [
        (f"{name}: {value}", f"{name}: {small_arguments[name]}" if name in small_arguments else "")
        for name, value in recipe_arguments.items()
    ]


def _exercise_verdict(old: object, new: object) -> str:
    if isinstance(old, str) and old != new and "|" not in old:
        return "no: needs a GPU"
    return YES if _is_used(new) else "no: too many ranks for rehearsal.max_ranks"


def _is_used(value: object) -> bool:
    """Return whether a setting switches something on, or divides something."""
    return value not in (None, False, "none") and (value is True or value != 1)


def write_coverage(
    folder: Path,
    title: str,
    rows: Sequence[StructureRow],
    phase_results: Sequence[PhaseResult],
    changes: Sequence[Change],
) -> None:
    """Print the tables and write them to `rehearsal.json` and `rehearsal.md`.

    Args:
        folder: where both files go.
        title: the recipe's name.
        rows: the parts of the recipe's structure.
        phase_results: the phases that were run.
        changes: what the miniature has otherwise than the recipe."""
    console = Console(width=140, highlight=False)
    columns = ("phase", "what it has shown", "seconds", "of CPU")
    phases = Table(*columns, title=f"rehearsal of {title}")
    for phase in phase_results:
        phases.add_row(*_phase_cells(phase))
    parts = Table("structure", "recipe", "miniature", "exercised")
    for row in rows:
        parts.add_row(*row)
    console.print(phases, parts)
    tables = {
        "recipe": title,
        "phases": [vars(phase) for phase in phase_results],
        "structure": [row._asdict() for row in rows],
        "changes": [change._asdict() for change in changes],
    }
    atomic_write(folder / "rehearsal.json", json.dumps(tables, indent=1))
    atomic_write(folder / "rehearsal.md", _markdown_tables(title, rows, phase_results))
    print(f"{folder / 'rehearsal.md'}; every changed setting is in rehearsal.json next to it")


def _phase_cells(phase: PhaseResult) -> tuple[str, str, str, str]:
    cpu_seconds = "" if phase.cpu_seconds is None else f"{phase.cpu_seconds:.0f}"
    return phase.phase, phase.evidence, f"{phase.seconds:.0f}", cpu_seconds


def _markdown_tables(
    title: str, rows: Sequence[StructureRow], phases: Sequence[PhaseResult]
) -> str:
    lines = [f"# Rehearsal of {title}", ""]
    lines += ["| phase | shown | seconds | of CPU |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_phase_cells(phase))} |" for phase in phases]
    lines += ["", "| structure | recipe | miniature | exercised |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
