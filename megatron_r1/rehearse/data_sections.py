"""The sections that name data, in miniature: `data`, `sft`, `reward_model`, `sample`."""

from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.rehearse import synthetic_data
from megatron_r1.rehearse.engine_sections import max_model_len
from megatron_r1.sample.filter_settings import FILTER_NAMES

NUM_QUESTIONS = 16
"""Number of synthetic questions, two of which are held out: a choice. A rollout of more questions
draws some of them several times."""


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
        "max_tokens": max_model_len(config) if config.reward_model.max_tokens else None,
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
