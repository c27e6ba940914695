"""examples/deepseek_r1/stage.sbatch, and examples/slurm's choice of a Python, with programs in
Slurm's place that write down how they are called; the scripts' way with a real Slurm is
tests/cluster's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from megatron_r1 import config as configuration
from megatron_r1.config.overrides import parse_overrides

EXAMPLES = Path(__file__).parents[3] / "examples"
SCRIPT = EXAMPLES / "deepseek_r1/stage.sbatch"
# Each call's words on a line. A trainer, or a sampling process, lasts until it is asked to end,
# and until each word of AFTER has been called: the script's background programs start in any order.
RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
    "scontrol show"*) echo node0; echo node1 ;;
    squeue*) echo R ;;
    srun*megatron_r1.engines.fleet.host*) exec sleep infinity ;;
    srun*)
        for word in $AFTER; do until grep -q "$word" "$CALLS"; do sleep 0.05; done; done
        while [ -n "$LASTS" ] && [ ! -e "$STOP" ]; do sleep 0.05; done; exit "${STATUS:-0}" ;;
esac
"""


@pytest.fixture
def stage(tmp_path):
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    for name in ("srun", "scontrol", "squeue", "curl"):
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
    environment.pop("ENGINE_PYTHON", None)

    def start(verb, *options, **more):
        return start.script(
            SCRIPT, sys.executable, "-m", "megatron_r1", verb, recipe, *options, **more
        )

    def script(*command, **more):
        return subprocess.Popen(["bash", *map(str, command)], env=environment | more)

    start.run, start.calls, start.script = run, tmp_path / "calls", script
    return start


def calls_of(stage) -> list[str]:
    return stage.calls.read_text().splitlines()


@pytest.mark.parametrize("verb", ["sft", "reward-model"])
def test_training_takes_every_node_and_no_engine(stage, verb):
    assert stage(verb, "--run.seed", "1").wait() == 0
    _, trainer = calls_of(stage)
    assert "--nnodes 2 --nproc-per-node 8" in trainer and "--rdzv-endpoint node0:29500" in trainer
    assert f"-m megatron_r1 {verb} " in trainer
    assert trainer.endswith(f"--run.folder {stage.run} --run.seed 1")
    assert (stage.run / "logs/ranks").is_dir()


def test_rl_brings_engine_hosts_which_end_with_it(stage):
    """They would have stayed for ever."""
    assert stage("rl", AFTER="megatron_r1.engines.fleet.host").wait() == 0
    calls = calls_of(stage)
    hosts = next(call for call in calls if "megatron_r1.engines.fleet.host" in call)
    trainer = next(call for call in calls if "torch.distributed.run" in call)
    assert hosts.endswith(
        f"-m megatron_r1.engines.fleet.host --folder {stage.run} --engines 1 --patience 3600"
    )
    options = trainer.partition(f"--run.folder {stage.run} ")[2].split()
    settings = parse_overrides(options)
    assert settings.pop("rollout.start_timeout_seconds") > 600
    assert settings == {
        "rollout.placement": "hosts",
        "rollout.hosts_per_engine": 16,
    }
    config = configuration.load_recipe(SCRIPT.with_name("r1_zero.yaml"), settings)
    assert config.push.transport == "nccl"
    assert config.rollout.engines * config.rollout.hosts_per_engine * 8 == 2048


def test_sampling_is_one_process_beside_engine_hosts_on_every_node(stage):
    assert stage("sample", AFTER="megatron_r1.engines.fleet.host").wait() == 0
    calls = calls_of(stage)
    hosts = next(call for call in calls if "megatron_r1.engines.fleet.host" in call)
    sampling = next(call for call in calls if "-m megatron_r1 sample " in call)
    assert hosts.startswith("srun --overlap --nodes 2 --ntasks 2 --nodelist node0,node1 ")
    assert sampling.startswith("srun --overlap --nodes 1 --ntasks 1 --nodelist node0 ")
    assert "--rollout.placement hosts --rollout.hosts_per_engine 16 " in sampling
    assert not any("torch.distributed" in call for call in calls)


def test_engines_and_served_models_have_a_python_of_their_own(stage):
    job = stage(
        "rl",
        AFTER="megatron_r1.engines.fleet.host engines.plugin.serve",
        ENGINE_PYTHON="/vllm/python",
        SERVED="helpful=/models/helpful",
        SERVED_NODES="1",
    )
    assert job.wait() == 0
    calls = calls_of(stage)
    (hosts,) = (call for call in calls if "megatron_r1.engines.fleet.host" in call)
    (served,) = (call for call in calls if "engines.plugin.serve" in call)
    (trainer,) = (call for call in calls if "torch.distributed.run" in call)
    assert " --nodelist node0 /vllm/python -m megatron_r1.engines.fleet.host " in hosts
    assert " /vllm/python --model /models/helpful " in served
    assert f" {sys.executable} -m torch.distributed.run " in trainer
    assert not any(sys.executable in call for call in (hosts, served))


@pytest.mark.parametrize("name", ["colocated", "pools"])
@pytest.mark.parametrize(
    ("given", "of_engines"),
    [({}, "/trainer/python"), ({"ENGINE_PYTHON": "/vllm/python"}, "/vllm/python")],
)
def test_scripts_for_many_nodes_start_engine_hosts_with_engine_python(
    stage, name, given, of_engines
):
    job = stage.script(
        EXAMPLES / f"slurm/{name}.sbatch",
        AFTER="megatron_r1.engines.fleet.host",
        RUN=str(stage.run),
        PYTHON="/trainer/python",
        SLURM_JOB_NODELIST_HET_GROUP_0="node0",
        SLURM_JOB_NUM_NODES_HET_GROUP_0="1",
        SLURM_JOB_NUM_NODES_HET_GROUP_1="1",
        **given,
    )
    assert job.wait() == 0
    calls = calls_of(stage)
    (hosts,) = (call for call in calls if "megatron_r1.engines.fleet.host" in call)
    (trainer,) = (call for call in calls if "torch.distributed.run" in call)
    assert f" {of_engines} -m megatron_r1.engines.fleet.host --folder {stage.run} " in hosts
    assert " /trainer/python -m torch.distributed.run " in trainer


@pytest.mark.parametrize(("status", "is_requeued"), [("130", True), ("0", False)])
def test_out_of_time_it_stops_in_order_and_goes_on_unless_it_was_done(
    stage, tmp_path, status, is_requeued
):
    # The trainer has ended before the script's signal handler has.
    (tmp_path / "bin/touch").write_text('#!/bin/bash\n/usr/bin/touch "$@"\nsleep 0.5\n')
    (tmp_path / "bin/touch").chmod(0o755)
    job = stage("sft", LASTS="yes", STATUS=status)
    wait_until(lambda: stage.calls.exists() and len(calls_of(stage)) >= 2)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == int(status)
    assert ("scontrol requeue 7" in calls_of(stage)) == is_requeued
    assert not (stage.run / "stop").exists()


def test_a_mistake_is_not_requeued(stage):
    assert stage("sft", STATUS="2").wait() == 2
    assert not any(call.startswith("scontrol requeue") for call in calls_of(stage))
