"""examples/deepseek_r1/stage.sbatch with programs in Slurm's place that write down how they are
called; the scripts' way with a real Slurm is tests/cluster's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_r1 import config as configuration
from megatron_r1.config.overrides import parse_overrides

SCRIPT = Path(__file__).parents[2] / "examples/deepseek_r1/stage.sbatch"
# Each call's words on a line. A trainer, or a sampling process, lasts until it is asked to end.
RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
    "scontrol show"*) echo node0; echo node1 ;;
    squeue*) echo R ;;
    srun*megatron_r1.rollout.host*) exec sleep 60 ;;
    srun*)
        until [ -z "$AFTER" ] || grep -q "$AFTER" "$CALLS"; do sleep 0.05; done
        while [ -n "$LASTS" ] && [ ! -e "$STOP" ]; do sleep 0.05; done; exit "${STATUS:-0}" ;;
esac
"""


@pytest.fixture
def stage(tmp_path):
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    for name in ("srun", "scontrol", "squeue"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {{folder: {run}}}\n")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STOP": str(run / "stop"),
        "LASTS": "",
        "AFTER": "",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
    }

    def start(verb, *options, **more):
        command = ["bash", SCRIPT, sys.executable, "-m", "megatron_r1", verb, recipe, *options]
        return subprocess.Popen(list(map(str, command)), env=environment | more)

    start.run, start.calls = run, tmp_path / "calls"
    return start


def calls_of(stage) -> list[str]:
    return stage.calls.read_text().splitlines()


@pytest.mark.parametrize("verb", ["sft", "reward-model"])
def test_training_takes_every_node_and_no_engine(stage, verb):
    assert stage(verb, "--run.seed", "1").wait(30) == 0
    _, trainer = calls_of(stage)
    assert "--nnodes 2 --nproc-per-node 8" in trainer and "--rdzv-endpoint node0:29500" in trainer
    assert f"-m megatron_r1 {verb} " in trainer
    assert trainer.endswith(f"--run.folder {stage.run} --run.seed 1")
    assert (stage.run / "logs/ranks").is_dir()


def test_rl_brings_engine_hosts_which_end_with_it(stage):
    """They would have stayed for a minute."""
    assert stage("rl", AFTER="megatron_r1.rollout.host").wait(30) == 0
    calls = calls_of(stage)
    hosts = next(call for call in calls if "megatron_r1.rollout.host" in call)
    trainer = next(call for call in calls if "torch.distributed.run" in call)
    assert hosts.endswith(
        f"-m megatron_r1.rollout.host --folder {stage.run} --engines 1 --patience 3600"
    )
    options = trainer.partition(f"--run.folder {stage.run} ")[2].split()
    settings = parse_overrides(options)
    assert settings.pop("rollout.start_timeout_seconds") > 600
    assert settings == {
        "rollout.placement": "hosts",
        "rollout.hosts_per_engine": 16,
        "push.transport": "nccl",
    }
    config = configuration.load(SCRIPT.with_name("r1_zero.yaml"), settings)
    assert config.rollout.engines * config.rollout.hosts_per_engine * 8 == 2048


def test_sampling_is_one_process_beside_engine_hosts_on_every_node(stage):
    assert stage("sample", AFTER="megatron_r1.rollout.host").wait(30) == 0
    calls = calls_of(stage)
    hosts = next(call for call in calls if "megatron_r1.rollout.host" in call)
    sampling = next(call for call in calls if "-m megatron_r1 sample " in call)
    assert hosts.startswith("srun --overlap --nodes 2 --ntasks 2 --nodelist node0,node1 ")
    assert sampling.startswith("srun --overlap --nodes 1 --ntasks 1 --nodelist node0 ")
    assert "--rollout.placement hosts --rollout.hosts_per_engine 16 " in sampling
    assert not any("torch.distributed" in call for call in calls)


@pytest.mark.parametrize(("status", "is_requeued"), [("130", True), ("0", False)])
def test_out_of_time_it_stops_in_order_and_goes_on_unless_it_was_done(stage, status, is_requeued):
    job = stage("sft", LASTS="yes", STATUS=status)
    while not stage.calls.exists() or len(calls_of(stage)) < 2:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == int(status)
    assert ("scontrol requeue 7" in calls_of(stage)) == is_requeued
    assert not (stage.run / "stop").exists()


def test_a_mistake_is_not_requeued(stage):
    assert stage("sft", STATUS="2").wait(30) == 2
    assert not any(call.startswith("scontrol requeue") for call in calls_of(stage))
