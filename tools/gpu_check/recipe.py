"""Runs the flagship recipe in miniature on the GPUs that are here, and judges the run:
`python -m tools.gpu_check.recipe CASE FOLDER`.

As in the recipe engines are on the trainer's GPUs, in turn: they sleep while the trainer computes,
are woken, and get its weights. Every push is proven by checksums and probes. Three steps."""

import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from megatron_r1.base.processes.log_excerpts import last_lines
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config
from megatron_r1.rehearse import launch, miniature
from megatron_r1.rehearse.started_phase import find_errors
from megatron_r1.reporting.run_folder import RunFolder
from tools.gpu_check import verdict
from tools.gpu_check.miniatures import (
    check_fp8,
    device_kind,
    num_gpus,
    recipe_miniature,
    with_settings,
)
from tools.gpu_check.verdict import CheckFailed

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {},
    "cuda_ipc": {"push": {"transport": "cuda_ipc"}},
    "fp8": {"push": {"transport": "cuda_ipc", "fp8": True}},
}
"""Settings that differ from the recipe's."""
ONE_RANK_CASES = ("cuda_ipc", "fp8")
"""Cases of one trainer rank."""
MAX_DIFF = {"fp8": 0.2}
"""The largest mean difference of engine's and trainer's log-probabilities: bf16 gives 0.01, FP8
weights in the engine alone 0.06; other weights 0.8."""
MAX_DIFF_BF16 = 0.05
ASLEEP, AWAKE = 0.5, 0.8
"""Shares of the most memory that was in use on GPU 0: less than the first while the trainer
computes, more than the second while engines do."""
POLL_SECONDS = 0.1
ENGINE_LINES = 12
"""Of an engine's log, that are shown of a run that failed."""


def settings(case: str, folder: Path) -> miniature.Miniature:
    """Return the recipe's miniature. Where there is no GPU it pushes as a CPU can."""
    small = recipe_miniature(
        folder, 1 if case in ONE_RANK_CASES else max(1, num_gpus()), **CASES[case]
    )
    overrides: dict[str, dict[str, Any]] = {}
    if device_kind() == "cpu":
        transport = small.config.push.transport
        overrides = {
            "push": {"transport": TRANSPORTS[transport].without_gpu or transport},
            "rollout": {"gpu_memory": None},
            "model": {"attention_backend": "auto", "fusions": []},
        }
    return replace(small, config=with_settings(small.config, **overrides))


class UsedMemory:
    """The memory that is in use on GPU 0, looked at in a thread."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample_memory, daemon=True)

    def __enter__(self) -> Self:
        if device_kind() != "cpu":
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()

    def _sample_memory(self) -> None:
        import torch

        while not self._ends.wait(POLL_SECONDS):
            free, total = torch.cuda.mem_get_info(0)
            self.samples.append(total - free)

    @property
    def peak(self) -> int:
        """The most that was in use."""
        return max(self.samples, default=0)

    @property
    def wakes(self) -> int:
        """How often engines took their memory, the first time included."""
        num_wakes, are_awake = 0, False
        for num_bytes in self.samples:
            if not are_awake and num_bytes > AWAKE * self.peak:
                num_wakes, are_awake = num_wakes + 1, True
            elif num_bytes < ASLEEP * self.peak:
                are_awake = False
        return num_wakes


def run(recipe: Path, config: Config, verb: str = "rl") -> UsedMemory:
    """Run a verb with the recipe to its end.

    Args:
        recipe: the recipe's file.
        config: the recipe as read.
        verb: the subcommand of megatron-r1.

    Raises:
        CheckFailed: the run fails; the message has its own error."""
    log = recipe.with_name("log.txt")
    running_command = launch.running_command(verb, recipe, config, [], log)
    with UsedMemory() as used_memory, running_command as process:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    if process.returncode:
        errors = find_errors(log) or [f"{log} ends: {last_lines(log, 1)}"]
        reason = " ".join(line.strip() for line in errors[0].splitlines()[:2])  # with its cause
        print(last_lines(log), *_engine_errors(RunFolder(config.run.folder).path), sep="\n")
        raise CheckFailed(f"the run ended with status {process.returncode}: {reason}")
    return used_memory


def _engine_errors(folder: Path) -> list[str]:
    """Return the last lines of each engine's log that vLLM marks as errors of its core."""
    error_lines: list[str] = []
    for log in sorted((folder / "logs").glob("engine-*.log")):
        lines = log.read_text(errors="replace").splitlines()
        core_errors = [line for line in lines if "EngineCore" in line and "ERROR" in line]
        error_lines += [f"{log}:", *core_errors[-ENGINE_LINES:]]
    return error_lines


def evaluate(
    lines: Sequence[Mapping[str, Any]], steps: int, used_memory: UsedMemory, max_diff: float
) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        lines: the lines of metrics.jsonl.
        steps: as many as there must be.
        used_memory: how much of a GPU's memory was in use.
        max_diff: the largest mean difference of engine's and trainer's log-probabilities.

    Raises:
        CheckFailed: a step is missing, a metric exceeds its limits, or engines did not sleep.
    """
    last = lines[-1] if lines else {}
    figures = {
        "logprob_diff": last.get("logprob_diff/mean"),
        "push/probe_diff": last.get("push/probe_diff"),
        **{f"{part} seconds": last.get(f"time/{part}") for part in ("rollout", "train", "push")},
        "GiB in use": round(used_memory.peak / 2**30, 2),
        "engines woke": used_memory.wakes - 1 if used_memory.samples else None,
    }
    if [line["step"] for line in lines] != list(range(1, steps + 1)):
        numbers = [line["step"] for line in lines]
        raise CheckFailed(f"steps {numbers} are recorded, and there are {steps}", **figures)
    for line in lines:
        step_name = f"step {line['step']}"
        norm, diff = line.get("grad_norm", math.nan), line.get("logprob_diff/mean", math.nan)
        if not (math.isfinite(norm) and norm > 0):
            raise CheckFailed(f"{step_name}: the gradients' norm is {norm}", **figures)
        if not diff <= max_diff:
            text = "engine and trainer differ by"
            raise CheckFailed(f"{step_name}: {text} {diff:.3g} nats, at most {max_diff}", **figures)
        if line.get("push/probe_diff") is None:
            raise CheckFailed(f"{step_name}: the push was not proven: no probe", **figures)
    if used_memory.samples and used_memory.wakes < 2:
        raise CheckFailed("engines keep their memory while they sleep", **figures)
    return figures


def check(case: str, folder: Path) -> dict[str, Any]:
    """Run a case and judge it."""
    folder = folder / f"recipe-{case}"
    if case == "fp8":
        check_fp8()
    small = settings(case, folder)
    shutil.rmtree(folder, ignore_errors=True)
    used_memory = run(miniature.write_miniature(small, "rl"), small.config)
    lines = list(RunFolder(small.config.run.folder).read_metrics())
    max_diff = MAX_DIFF.get(case, MAX_DIFF_BF16)
    figures = evaluate(lines, small.config.run.steps, used_memory, max_diff)
    parallel, rollout = small.config.parallel, small.config.rollout
    return figures | {
        "trainer": f"tensor {parallel.tensor}, context {parallel.context}, "
        f"expert {parallel.expert}, pipeline {parallel.pipeline} x {parallel.virtual_pipeline}, "
        f"{parallel.processes} ranks",
        "engines": f"{rollout.engines} of tensor {rollout.tensor_parallel} x data "
        f"{rollout.data_parallel}",
        "transport": small.config.push.transport,
    }


if __name__ == "__main__":
    sys.exit(verdict.run(lambda: check(sys.argv[1], Path(sys.argv[2]))))
