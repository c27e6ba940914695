"""Writes the policy before a step as a model folder, which an engine loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import checkpoint_model, transformers_adapters
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after


def write_policy(
    step: RecordedStep, num_parameters: int, folder: Path, free_bytes: int | None = None
) -> None:
    """Write the policy before a step, fp32, with its adapters merged.

    Args:
        step: what the run recorded of it.
        num_parameters: the number of the policy's weights.
        folder: an empty folder.
        free_bytes: the memory that all weights may take; None: as much as they need.

    Raises:
        CannotRecompute: there are no weights, or no room for them in memory or in the folder."""
    num_bytes, disk_bytes = 4 * num_parameters, shutil.disk_usage(folder).free
    if num_bytes > disk_bytes:
        raise CannotRecompute(
            f"the weights take {num_bytes / 1e9:.0f} GB in {folder.parent}, "
            f"{disk_bytes / 1e9:.0f} GB are free; set TMPDIR"
        )
    if free_bytes is not None and num_bytes > free_bytes:
        raise CannotRecompute(
            f"the weights take {num_bytes / 1e9:.1f} GB of memory while they are written for a "
            f"fresh engine, {free_bytes / 1e9:.1f} GB are free"
        )
    before, lora = step.checkpoint_before, step.run_config.model.lora
    source = before if lora is None else weights_after(step.folder, step.run_config, 0)
    if before is None or source is None:
        raise CannotRecompute(f"the weights after step {step.step - 1} are not here")
    tensors = checkpoint_model.read_tensors(source, step.hf_config)
    if lora is not None and source != before:
        names, read = checkpoint_model.read_adapter_factors(before, "")
        transformers_adapters.merge_adapters(
            tensors, {name: read(name) for name in names}, lora.scale
        )
    checkpoint_model.write_checkpoint_folder(tensors, step.model, folder)
