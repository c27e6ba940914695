"""Seconds of a micro-batch, and between the phases of a step.

Runs a recipe of examples/deepseek_r1 on one GPU with the widths of DeepSeek-V3 but two layers and
16 experts, and solves for the numbers with which `megatron-r1 plan` of that run takes the measured
seconds. Where there is no GPU the model is a miniature, and nothing is written."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from gpu_miniatures import (
    device_kind,
    hardware_name,
    widen_config,
    with_settings,
    write_calibration,
)
from recipe_runs import figures_of, run

from megatron_r1.config import load_recipe
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.plan.calibration import RunCalibration
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.push_costs import planned_rank_bytes, push_link
from megatron_r1.plan.recipe_job import planned_job
from megatron_r1.plan.timing import checkpoint_time, weight_load_time
from megatron_r1.rehearse import miniature
from megatron_r1.rehearse.synthetic_data import write_examples
from megatron_r1.reporting.run_folder import RunFolder
from tools.bench.host import ROOT

CASES = {"micro-batch": ("sft", "sft_800k"), "phases": ("rl", "r1_zero")}
"""The verb and the recipe of each."""
LAYERS, EXPERTS = 2, 16
"""With the vocabulary of a miniature 1.5 billion parameters: 27 GB in training, in an engine 3."""
TOKENS, EXAMPLES, WORDS = 4096, 256, 128
"""Of a micro-batch; examples of a batch and their most words, which make four micro-batches."""
STEPS = 4


def settings(case: str, folder: Path) -> miniature.Miniature:
    """Return the run's settings and its model."""
    recipe = ROOT / "examples" / "deepseek_r1" / f"{CASES[case][1]}.yaml"
    # The drafter has no part in these seconds.
    without_drafter = {"model.mtp": "none", "rollout.speculative.method": "none"}
    config = load_recipe(
        recipe, without_drafter | {"run.steps": STEPS, "push.transport": _push_transport()}
    )
    path = ROOT / config.model.path
    hf_config = {**read_hf_config(str(path)), "num_nextn_predict_layers": 0}
    small = miniature.make_miniature(
        config, hf_config, folder, 1, device="gpu" if device_kind() == "cpu" else device_kind()
    )
    one_stage = {"pipeline": 1, "virtual_pipeline": 1, "pipeline_layout": None}
    overrides: dict[str, dict[str, Any]] = {"run": {"steps": STEPS}, "parallel": one_stage}
    model = small.hf_config
    if device_kind() == "gpu":
        sizes = {"num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS}
        model = widen_config(hf_config, small.hf_config, **sizes)
        overrides["rollout"] = {"gpu_memory": 0.3}
    if device_kind() == "cpu":
        overrides["rollout"] = {"gpu_memory": None}
        overrides["model"] = {"attention_backend": "auto", "fusions": []}
    if case == "micro-batch":
        overrides["parallel"] = one_stage | {"tokens_per_microbatch": TOKENS}
        overrides["sft"] = {"batch_size": EXAMPLES if device_kind() == "gpu" else 16}
    return replace(small, config=with_settings(small.config, **overrides), hf_config=model)


def _push_transport() -> str:
    """Return the transport of pushes: within a GPU, or where there is none in the host."""
    return "cuda_ipc" if device_kind() == "gpu" else "shm"


def job_of_run(folder: Path, hardware: str) -> PlannedJob:
    """Return the job that the planner sees in a run's folder."""
    args, overrides = parse_job_arguments([str(folder / "config.yaml"), "--hardware", hardware])
    return planned_job(folder / "config.yaml", args, overrides, 1)


def fit_micro_batch(folder: Path, job: PlannedJob) -> dict[str, float]:
    """`compute_efficiency` of a run, whose seconds it explains."""
    measured = RunCalibration(folder, job)
    name = "compute_efficiency"
    assert name in measured.values, measured.reasons[name]
    return {name: measured.values[name]}


def fit_phases(
    lines: Sequence[Mapping[str, Any]], engine_log: str, job: PlannedJob
) -> dict[str, float]:
    """What is between the phases, each number where its seconds were measured: in the lines of
    metrics.jsonl without the first step's, and in an engine's log."""

    def seconds(key: str) -> float | None:
        finite_values = [line[key] for line in lines if math.isfinite(line.get(key) or math.nan)]
        return median(finite_values) if finite_values else None

    values: dict[str, float] = {}
    sleep_seconds, wake_seconds = (
        [float(text) for text in re.findall(rf"It took ([\d.]+) seconds to {action}", engine_log)]
        for action in ("fall asleep", "wake up")
    )
    if sleep_seconds and wake_seconds:
        values["sleep_seconds"] = mean(sleep_seconds)
        # Weights and cache wake one by one.
        values["wake_seconds"] = sum(wake_seconds) / len(sleep_seconds)
    if pause := seconds("push/pause"):
        load_seconds = [
            _planned_load_seconds(job, tensor_seconds) for tensor_seconds in (1e-15, 1.0)
        ]
        per_tensor = (pause - load_seconds[0]) / (load_seconds[1] - load_seconds[0])
        if per_tensor > 0:
            values["tensor_load_seconds"] = per_tensor
    if transfer := seconds("push/transfer"):
        fraction = planned_rank_bytes(job) / transfer
        fraction *= job.assumptions.push_efficiency / push_link(job)[0]
        if fraction <= 1:
            values["push_efficiency"] = fraction
    if blocked_seconds := seconds("checkpoint/seconds_blocked"):
        name = "host_link" if job.config.checkpoint.asynchronous else "storage"
        part = getattr(job.hardware if name == "host_link" else job.assumptions, name)
        planned_seconds = checkpoint_time(job).number * job.config.checkpoint.every
        values[name] = part * planned_seconds / blocked_seconds
    return values


def _planned_load_seconds(job: PlannedJob, seconds: float) -> float:
    """Return the planned seconds of a load where each tensor takes so long."""
    assumptions = replace(job.assumptions, tensor_load_seconds=seconds)
    return weight_load_time(replace(job, assumptions=assumptions)).number


def check(case: str, folder: Path, record_figures) -> None:
    """Run a case, and write the numbers that follow."""
    name, verb = hardware_name(), CASES[case][0]
    small = settings(case, folder)
    recipe = miniature.write_miniature(small, verb)
    if case == "micro-batch" and device_kind() == "gpu":
        write_examples(folder / "examples.jsonl", 2 * EXAMPLES, WORDS)
    run(recipe, small.config, verb, lambda lines: record_figures(figures_of(lines, case)))
    run_folder = Path(small.config.run.folder)
    job = job_of_run(run_folder, name)
    if case == "micro-batch":
        values = fit_micro_batch(run_folder, job)
    else:
        logs = sorted((run_folder / "logs").glob("engine-*.log"))
        engine_log = "".join(log.read_text(errors="replace") for log in logs)
        values = fit_phases(list(RunFolder(str(run_folder)).read_metrics())[1:], engine_log, job)
    assert values, "nothing was measured"
    record_figures(write_calibration(folder, name, values))
