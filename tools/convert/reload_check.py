"""The end of to-hf: load what was written with transformers, and the checkpoint with Megatron.

Each in a process of its own: transformers must not see the stand-ins Megatron needs on a CPU. A
model that does not fit into memory twice is compared tensor by tensor instead, which proves the
numbers but not that a library loads them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from comparison import Sides, compare
from sources import open_weights, read_config

from megatron_r1.processes.lifetime import die_with_parent
from megatron_r1.weights.layout import hf_tensors

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Of the logits' standard deviation; fp32 on both sides, sums in another order: 1e-5 is usual."""

_BYTES_PER_PARAMETER = 6  # fp32, and a half for what loading holds besides


def check(checkpoint: Path, hf_files: Path, folder: Path, dtype: torch.dtype, workers: int) -> None:
    """Raise ValueError, with what differs, unless `folder` is the model in `checkpoint`."""
    hf = read_config(hf_files, checkpoint)
    needed = _BYTES_PER_PARAMETER * sum(
        torch.Size(shape).numel() for shape, _ in hf_tensors(hf).values()
    )
    fits = needed < _available_bytes()
    if not fits:
        print(
            f"the model needs {needed / 1e9:.0f} GB to be run, {_available_bytes() / 1e9:.0f} are "
            "free: its logits are NOT compared, its tensors are",
            flush=True,
        )
    if not fits or dtype == torch.float8_e4m3fn:
        _same_tensors(checkpoint, hf_files, folder, workers)
    if fits:
        with open_weights(checkpoint, hf_files) as source:
            rounded = _rounding(source.dtype, dtype)
        _same_logits(checkpoint, folder, dtype, rounded)


def _same_tensors(checkpoint: Path, hf_files: Path, folder: Path, workers: int) -> None:
    with open_weights(folder, None) as written:
        names = list(written.tensors)
    differing = compare(Sides(checkpoint, folder, hf_files), names, workers)
    if differing:
        worst = max(differing, key=lambda d: d.largest)
        raise ValueError(
            f"{folder} is not the checkpoint: {len(differing)} tensors differ, {worst.name} by "
            f"{worst.largest:.3g}; the disk may be failing: remove the folder and convert again"
        )
    print(f"reread: {len(names)} tensors are the checkpoint's")


def _rounding(stored: torch.dtype, dtype: torch.dtype) -> str:
    """What the weights go through before either library has them, in words."""
    if dtype == torch.float8_e4m3fn:
        return ", both on the weights rounded to FP8 (what rounding changes is not compared)"
    if torch.promote_types(stored, dtype) == dtype:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f", both on the weights rounded to {name} (what rounding changes is not compared)"


def _same_logits(checkpoint: Path, folder: Path, dtype: torch.dtype, rounded: str) -> None:
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "megatron.pt", Path(scratch) / "transformers.pt"
        _ask("logits_of_megatron.py", checkpoint, folder, name, ours)
        _ask("logits_of_transformers.py", folder, theirs)
        expected, found = torch.load(ours), torch.load(theirs)
    gap = float((expected - found).abs().max() / expected.std())
    if not gap <= TOLERANCE:
        raise ValueError(
            f"transformers' logits of {folder} differ from Megatron's of {checkpoint} by {gap:.2g} "
            f"of their standard deviation (at most {TOLERANCE:g}): do not use it; compare the "
            "tensors with tools/convert verify"
        )
    print(f"reloaded: transformers' logits are Megatron's{rounded}: max |Δ| / σ = {gap:.1e}")


def _ask(script: str, *arguments) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "arn" not in line]
        raise ValueError(f"{script} ended with {done.returncode}:\n" + "\n".join(lines[-8:]))


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
