"""Compares a converted Hugging Face folder with its checkpoint, by logits or by tensors."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.children import die_with_parent
from megatron_r1.base.processes.host_memory import free_bytes
from megatron_r1.commands.convert.sources import open_weights, read_config
from megatron_r1.commands.convert.verify import ModelPair, compare_tensors
from megatron_r1.models.weights import num_parameters
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights

REPOSITORY = Path(__file__).resolve().parents[3]
LOGIT_TOLERANCE = 1e-3
"""Relative to the logits' standard deviation; fp32 sums in another order usually give 1e-5."""
_BYTES_PER_PARAMETER = 6  # fp32, and half as much again while loading


def check_reload(
    checkpoint: Path, hf_files: Path, folder: Path, dtype: torch.dtype, workers: int
) -> None:
    """Compare a converted folder with its checkpoint, by logits or by tensors. Tensors are compared
    where the model does not fit into this host's memory, and where they are stored in FP8.

    Args:
        checkpoint: the Megatron checkpoint.
        hf_files: the folder with the model's `config.json`.
        folder: the Hugging Face folder that was written.
        dtype: the dtype of its weights.
        workers: processes that compare tensors.

    Raises:
        UserError: a difference; it names the largest."""
    hf_config = read_config(hf_files, checkpoint)
    size = _BYTES_PER_PARAMETER * num_parameters(hf_config)
    free = free_bytes()
    fits = size < free
    if not fits:
        gigabytes = f"the model needs {size / 1e9:.0f} GB to be run, {free / 1e9:.0f} are free"
        print(f"{gigabytes}: its logits are NOT compared, its tensors are", flush=True)
    if not fits or dtype == torch.float8_e4m3fn:
        _same_tensors(checkpoint, hf_files, folder, workers)
    if fits:
        with MegatronWeights(checkpoint, hf_config) as source:
            rounded = _rounding_text(source.dtype, dtype)
        _same_logits(checkpoint, folder, dtype, rounded)


def _same_tensors(checkpoint: Path, hf_files: Path, folder: Path, workers: int) -> None:
    with open_weights(folder, None) as written:
        names = list(written.tensors)
    differing = compare_tensors(ModelPair(checkpoint, folder, hf_files), names, workers)
    if differing:
        worst = max(differing, key=lambda d: d.max_difference)
        raise UserError(
            f"{folder} is not the checkpoint: {len(differing)} tensors differ, {worst.name} by "
            f"{worst.max_difference:.3g}; the disk may be failing: remove the folder and convert "
            "again",
            key="out",
            cause=Cause.CONFLICT,
        )
    print(f"reread: {len(names)} tensors are the checkpoint's")


def _rounding_text(stored_dtype: torch.dtype, dtype: torch.dtype) -> str:
    """Return, in words, how the weights of both sides are rounded before the comparison."""
    fp8 = dtype == torch.float8_e4m3fn
    if not fp8 and torch.promote_types(stored_dtype, dtype) == dtype:
        return ""
    name = "FP8" if fp8 else str(dtype).removeprefix("torch.")
    return f", both on the weights rounded to {name} (what rounding changes is not compared)"


def _same_logits(checkpoint: Path, folder: Path, dtype: torch.dtype, rounding_text: str) -> None:
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        megatron_logits = Path(scratch) / "megatron.pt"
        transformers_logits = Path(scratch) / "transformers.pt"
        _write_logits("megatron", checkpoint, folder, name, megatron_logits)
        _write_logits("transformers", folder, transformers_logits)
        expected, exported = torch.load(megatron_logits), torch.load(transformers_logits)
    gap = float((expected - exported).abs().max() / expected.std())
    if not gap <= LOGIT_TOLERANCE:
        raise UserError(
            f"transformers' logits of {folder} differ from Megatron's of {checkpoint} by {gap:.2g} "
            f"of their standard deviation (at most {LOGIT_TOLERANCE:g}): do not use it; compare "
            "the "
            "tensors with megatron-r1 convert verify",
            key="out",
            cause=Cause.CONFLICT,
        )
    print(f"reloaded: transformers' logits are Megatron's{rounding_text}: max |Δ| / σ = {gap:.1e}")


def _write_logits(library: str, *arguments: str | Path) -> None:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_r1.commands.convert.logits",
            library,
            *map(str, arguments),
        ],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )
    if process.returncode:
        lines = [line for line in process.stdout.splitlines() if "arn" not in line]
        raise UserError(
            f"{library} ended with {process.returncode}:\n" + "\n".join(lines[-8:]),
            key=library,
            cause=Cause.FAILED,
        )
