"""The last step of to-hf: transformers' logits of the result against Megatron's of the checkpoint.

A model that does not fit into memory is compared tensor by tensor instead, which verifies the
values, but not that a library loads them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.lifetime import die_with_parent
from megatron_r1.commands.convert.sources import open_weights, read_config
from megatron_r1.commands.convert.verify import Sides, compare
from megatron_r1.models.weights import num_parameters
from megatron_r1.models.weights.stored.megatron_weights import MegatronWeights

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-3
"""Relative to the logits' standard deviation; fp32 sums in another order usually give 1e-5."""

_BYTES_PER_PARAMETER = 6  # fp32, and half as much again while loading


def check(checkpoint: Path, hf_files: Path, folder: Path, dtype: torch.dtype, workers: int) -> None:
    """Raise UserError with the difference unless `folder` is the model in `checkpoint`."""
    hf = read_config(hf_files, checkpoint)
    needed = _BYTES_PER_PARAMETER * num_parameters(hf)
    free = psutil.virtual_memory().available
    fits = needed < free
    if not fits:
        gigabytes = f"the model needs {needed / 1e9:.0f} GB to be run, {free / 1e9:.0f} are free"
        print(f"{gigabytes}: its logits are NOT compared, its tensors are", flush=True)
    if not fits or dtype == torch.float8_e4m3fn:
        _same_tensors(checkpoint, hf_files, folder, workers)
    if fits:
        with MegatronWeights(checkpoint, hf) as source:
            rounded = _rounding(source.dtype, dtype)
        _same_logits(checkpoint, folder, dtype, rounded)


def _same_tensors(checkpoint: Path, hf_files: Path, folder: Path, workers: int) -> None:
    with open_weights(folder, None) as written:
        names = list(written.tensors)
    differing = compare(Sides(checkpoint, folder, hf_files), names, workers)
    if differing:
        worst = max(differing, key=lambda d: d.largest)
        raise UserError(
            f"{folder} is not the checkpoint: {len(differing)} tensors differ, {worst.name} by "
            f"{worst.largest:.3g}; the disk may be failing: remove the folder and convert again",
            key="out",
            cause=Cause.CONFLICT,
        )
    print(f"reread: {len(names)} tensors are the checkpoint's")


def _rounding(stored: torch.dtype, dtype: torch.dtype) -> str:
    """Return, in words, how the weights of both sides are rounded before the comparison."""
    fp8 = dtype == torch.float8_e4m3fn
    if not fp8 and torch.promote_types(stored, dtype) == dtype:
        return ""
    name = "FP8" if fp8 else str(dtype).removeprefix("torch.")
    return f", both on the weights rounded to {name} (what rounding changes is not compared)"


def _same_logits(checkpoint: Path, folder: Path, dtype: torch.dtype, rounded: str) -> None:
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "megatron.pt", Path(scratch) / "transformers.pt"
        _write_logits("megatron", checkpoint, folder, name, ours)
        _write_logits("transformers", folder, theirs)
        expected, found = torch.load(ours), torch.load(theirs)
    gap = float((expected - found).abs().max() / expected.std())
    if not gap <= TOLERANCE:
        raise UserError(
            f"transformers' logits of {folder} differ from Megatron's of {checkpoint} by {gap:.2g} "
            f"of their standard deviation (at most {TOLERANCE:g}): do not use it; compare the "
            "tensors with megatron-r1 convert verify",
            key="out",
            cause=Cause.CONFLICT,
        )
    print(f"reloaded: transformers' logits are Megatron's{rounded}: max |Δ| / σ = {gap:.1e}")


def _write_logits(library: str, *arguments: str | Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
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
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "arn" not in line]
        raise UserError(
            f"{library} ended with {done.returncode}:\n" + "\n".join(lines[-8:]),
            key=library,
            cause=Cause.FAILED,
        )
