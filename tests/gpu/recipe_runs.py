"""Runs the flagship recipe in miniature on the GPUs that are here, and judges the run.

As in the recipe engines are on the trainer's GPUs, in turn: they sleep while the trainer computes,
are woken, and get its weights. Every push is proven by checksums and probes. Three steps."""

import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from gpu_miniatures import device_kind, num_gpus, recipe_miniature, with_settings

from megatron_r1.base.processes.log_excerpts import last_lines
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.config import Config
from megatron_r1.rehearse import launch, miniature
from megatron_r1.rehearse.started_phase import find_errors
from megatron_r1.reporting.run_folder import RunFolder

FP8 = {"push": {"transport": "cuda_ipc", "fp8": True}}
CASES = {"recipe": {}, "nccl": {}, "fp8": FP8, "fp8-eager": FP8}
"""Settings that differ from the recipe's."""
MAX_DIFF = {"fp8": 0.2, "fp8-eager": 0.2}
"""The largest mean difference of engine's and trainer's log-probabilities: bf16 gives 0.01, FP8
weights in the engine alone 0.06; other weights 0.8."""
MAX_DIFF_BF16 = 0.05
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]
"""Tokens of a decoding step of at most 16 sequences, with a draft for each; vLLM would capture
graphs of 51 sizes."""
ASLEEP, AWAKE = 0.5, 0.8
"""Shares of the most memory that was in use on GPU 0: less than the first while the trainer
computes, more than the second while engines do."""
POLL_SECONDS = 0.1
ENGINE_LINES = 12
"""Of an engine's log, that are shown of a run that failed."""


def settings(case: str, folder: Path) -> miniature.Miniature:
    """The recipe's miniature. Where there is no GPU it pushes as a CPU can."""
    ranks = max(1, num_gpus()) if case == "nccl" else 1
    small = recipe_miniature(folder, ranks, **CASES[case])
    vllm = dict(small.config.rollout.vllm)
    if device_kind() == "gpu":
        eager = {"enforce_eager": True}
        vllm |= eager if case == "fp8-eager" else {"cudagraph_capture_sizes": GRAPH_SIZES}
    overrides = {"rollout": {"vllm": vllm}}
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


def run(recipe: Path, config: Config, verb: str = "rl", on_step=lambda lines: None) -> UsedMemory:
    """Run a verb with the recipe to its end; on_step: called with the lines of metrics.jsonl after
    each step."""
    log, run_folder = recipe.with_name("log.txt"), RunFolder(config.run.folder)
    known = 0
    running_command = launch.running_command(verb, recipe, config, [], log)
    with UsedMemory() as used_memory, running_command as process:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            lines = _steps(run_folder)
            if len(lines) > known:
                known = len(lines)
                on_step(lines)
    if process.returncode:
        errors = find_errors(log) or [f"{log} ends: {last_lines(log, 1)}"]
        reason = " ".join(line.strip() for line in errors[0].splitlines()[:2])  # with its cause
        print(last_lines(log), *_engine_errors(run_folder.path), sep="\n")
        raise AssertionError(f"the run ended with status {process.returncode}: {reason}")
    return used_memory


def _steps(run_folder: RunFolder) -> list[dict]:
    try:
        return list(run_folder.read_metrics())
    except (OSError, ValueError):  # not there yet, or half a line
        return []


def _engine_errors(folder: Path) -> list[str]:
    """The last lines of each engine's log that vLLM marks as errors of its core."""
    error_lines: list[str] = []
    for log in sorted((folder / "logs").glob("engine-*.log")):
        lines = log.read_text(errors="replace").splitlines()
        core_errors = [line for line in lines if "EngineCore" in line and "ERROR" in line]
        error_lines += [f"{log}:", *core_errors[-ENGINE_LINES:]]
    return error_lines


def figures_of(lines, case: str) -> dict:
    """The figures of the steps until now, by step."""
    names = ("logprob_diff/mean", "push/probe_diff", "time/rollout", "time/train", "time/push")
    return {
        f"{case}: {name}": " ".join(f"{line.get(name, math.nan):.3g}" for line in lines)
        for name in names
    }


def judge(lines, steps: int, used_memory: UsedMemory, max_diff: float) -> None:
    """Fail where a step is missing, a metric exceeds its limits, or engines did not sleep."""
    numbers = [line["step"] for line in lines]
    assert numbers == list(range(1, steps + 1)), f"steps {numbers} of {steps} are recorded"
    for line in lines:
        step, norm, diff = line["step"], line["grad_norm"], line["logprob_diff/mean"]
        assert math.isfinite(norm) and norm > 0, f"step {step}: the gradients' norm is {norm}"
        assert diff <= max_diff, f"step {step}: engine and trainer differ by {diff:.3g} nats"
        assert line.get("push/probe_diff") is not None, f"step {step}: the push was not proven"
    if used_memory.samples:
        assert used_memory.wakes > 1, "engines keep their memory while they sleep"


def check(case: str, folder: Path, record_figures) -> None:
    """Run a case and judge it."""
    folder = folder / case
    small = settings(case, folder)
    parallel, rollout = small.config.parallel, small.config.rollout
    record_figures(
        {
            "trainer": f"tensor {parallel.tensor}, context {parallel.context}, expert "
            f"{parallel.expert}, pipeline {parallel.pipeline} x {parallel.virtual_pipeline}",
            "engines": f"{rollout.engines} of tensor {rollout.tensor_parallel} x data "
            f"{rollout.data_parallel}",
            "transport": small.config.push.transport,
        }
    )
    start = time.monotonic()

    def on_step(lines) -> None:
        seconds = {f"{case}: seconds until step {len(lines)}": round(time.monotonic() - start, 1)}
        record_figures(figures_of(lines, case) | seconds)

    recipe = miniature.write_miniature(small, "rl")
    used_memory = run(recipe, small.config, on_step=on_step)
    lines = list(RunFolder(small.config.run.folder).read_metrics())
    on_step(lines)
    woke = used_memory.wakes - 1 if used_memory.samples else None
    gib = round(used_memory.peak / 2**30, 2)
    record_figures({f"{case}: GiB in use": gib, f"{case}: engines woke": woke})
    judge(lines, small.config.run.steps, used_memory, MAX_DIFF.get(case, MAX_DIFF_BF16))
